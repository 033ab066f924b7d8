"""What an OpenAI-compatible server is: its address, its kind, and what its kind can do.

`probe` asks the server for what is not set. Knows no requests and no answers to them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from mxn.errors import ConfigError
from mxn.serve.replicas.http_client import HttpClient, HttpLimits
from mxn.serve.replicas.upstream import Kind

_BASICS = frozenset({"temperature", "top_p", "seed", "stop", "frequency_penalty",
                     "presence_penalty", "logit_bias", "max_tokens"})  # fmt: skip
_OPEN = _BASICS | {"top_k", "min_p", "ignore_eos"}
_VLLM = _OPEN | {"repetition_penalty", "min_tokens", "stop_token_ids", "skip_special_tokens",
                 "include_stop_str", "token_ids", "logprobs", "continuous_usage"}  # fmt: skip
CAPABILITIES: dict[Kind, frozenset[str]] = {
    "openai": _BASICS,
    "mindie": _BASICS,
    "llama.cpp": _OPEN | {"repetition_penalty"},
    "sglang": _OPEN | {"repetition_penalty", "min_tokens", "stop_token_ids", "skip_special_tokens"},
    "vllm": _VLLM,
    "mxn": _VLLM - {"token_ids", "logprobs", "continuous_usage"},
}
_OWNERS: dict[str, Kind] = {
    "vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp", "mxn": "mxn",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CompatConfig:
    """`kind`, `max_context` and `capabilities` None: asked of the server (`CompatEngine.connect`).

    `capabilities` are names of sampling parameters, and token_ids, logprobs, continuous_usage.
    """

    url: str
    model: str
    kind: Kind | None = None
    key: str | None = None
    chip: str = ""
    device: str = ""
    max_context: int | None = None
    capabilities: frozenset[str] | None = None
    is_embedder: bool = False
    limits: HttpLimits | None = None


async def probe(http: HttpClient, config: CompatConfig) -> CompatConfig:
    """Return `config` with kind and context length as the server says, where they are not set.

    Raises: ConnectionLost; ConfigError when the model is not there or a limit is not known.
    """
    card = await _card(http, config)
    kind = config.kind or _OWNERS.get(str(card.get("owned_by", "")).lower(), "openai")
    context = config.max_context or card.get("max_model_len")
    if context is None and kind == "llama.cpp":
        answer, body = await http.fetch("GET", "/props")
        if answer.status == 200:
            settings = msgspec.json.decode(body).get("default_generation_settings") or {}
            context = settings.get("n_ctx")
    if not isinstance(context, int) and not config.is_embedder:
        raise ConfigError(
            f"{config.url} does not say how long the context of {config.model!r} is",
            hint="set max_context for this replica",
        )
    return replace(config, kind=kind, max_context=context)


async def _card(http: HttpClient, config: CompatConfig) -> dict[str, Any]:
    """Return the model's entry of /v1/models. Raises: ConfigError."""
    answer, body = await http.fetch("GET", "/v1/models")
    if answer.status in (401, 403):
        raise ConfigError(f"{config.url} refused our key", hint="give the replica a valid key")
    if answer.status != 200:
        raise ConfigError(f"{config.url}/v1/models answered {answer.status}")
    try:
        cards = msgspec.json.decode(body)["data"]
    except (msgspec.MsgspecError, KeyError, TypeError):
        raise ConfigError(f"{config.url} is no OpenAI-compatible server") from None
    found = next((card for card in cards if card.get("id") == config.model), None)
    if found is None:
        names = ", ".join(repr(card.get("id")) for card in cards[:20])
        raise ConfigError(f"{config.url} has no model {config.model!r}; it has {names}")
    return found
