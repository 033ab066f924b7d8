"""Settings of a server that are not about a model."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Limits and keys. An empty `api_keys` means that no key is asked for."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)  # never in a log
    max_body_bytes: int = 32 << 20
    request_timeout_s: float | None = None  # from arrival to the last token; None: no limit
    max_requests: int | None = None  # under way at the same time; None: no limit
    heartbeat_s: float = 15.0  # silence after which a stream sends `: ping`
    max_inputs: int = 2048  # texts in one embeddings, rerank or score request
    cors_origins: tuple[str, ...] = ()
    adapter_folder: str | None = None  # adapters are loaded from below it only; None: from anywhere
    # How answers are read; None: as the model's chat template and vocabulary say. The names are in
    # mxn.serve.chat.tools.formats and mxn.serve.chat.reasoning.
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    # For other projects' test suites: any name means the only model, max_tokens 0 means unset.
    is_lenient: bool = False

    def __post_init__(self) -> None:
        """Refuse unknown parsers at the start. Raises: ConfigError with those that exist."""
        from mxn.serve.chat.reasoning import check_reasoning_name
        from mxn.serve.chat.tools.formats import check_format_name

        if self.tool_parser is not None:
            check_format_name(self.tool_parser)
        if self.reasoning_parser is not None:
            check_reasoning_name(self.reasoning_parser)
