"""The messages between a server and a replica, and the client side of a replica as a Protocol.

Token ids go in and come out; text is detokenized next to the tokens so that stop strings stop at
once. Messages are `msgspec` structs and travel as MessagePack. Knows no HTTP, torch or scheduling.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, Protocol

import msgspec

FinishReason = Literal["stop", "length", "cancelled"]
MAX_GRAMMAR_CHARS = 256 * 2**10  # of a grammar's source; a longer one is refused
ENDED_CODE = "engine_unavailable"  # of a `Failed` whose only reason is that the process ends


class Grammar(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the text of an answer must look like; enforced token by token.

    `kind` says what `source` is: a JSON schema, a regular expression, a grammar in llguidance's
    Lark dialect, or one string per line to choose from.
    """

    kind: Literal["json_schema", "regex", "lark", "choice"]
    source: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens. Temperature 0 is greedy and deterministic."""

    max_tokens: int | None = None  # None: up to the end of the context
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None  # alternatives beside the chosen token; 0: the chosen one only
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None


class TokenLogprob(msgspec.Struct, frozen=True):
    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []  # (token id, logprob), best first


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    priority: int = 0  # smaller runs first
    # Tokens this request has made already, on a replica that is gone. They count as output for
    # every rule (limits, penalties, seeds, stop strings, grammar), are not sampled again, and the
    # text of all of them is in the first delta; its `token_ids` hold the new ones only.
    resume_ids: list[int] = []
    adapter: str | None = None  # name of a loaded LoRA adapter; None: the base model


class Encode(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Embed or score token sequences; one result row for each."""

    request_id: str
    sequences: list[list[int]]
    token_types: list[list[int]] | None = None


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    request_id: str


class GetStats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    request_id: str


class LoadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Load a LoRA adapter in PEFT's layout from a folder that the replica can read."""

    request_id: str
    name: str
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Forget an adapter; requests that use it finish first."""

    request_id: str
    name: str


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


ToEngine = Generate | Encode | Cancel | GetStats | LoadAdapter | UnloadAdapter | Shutdown


class Delta(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """What one step added to a request. The last one of a request carries `finish_reason`.

    All deltas of a request joined give its whole text. `token_ids` may run ahead of `text`: text
    that could still become a stop string or half a character is held back.
    """

    request_id: str
    token_ids: list[int] = []
    text: str = ""
    logprobs: list[TokenLogprob] | None = None  # one for each of token_ids, when asked for
    prompt_logprobs: list[TokenLogprob | None] | None = None  # first delta only; [0] is None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token id that ended it
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0  # so far, with resumed ones
    device_s: float = 0.0  # last delta only: this request's share of the steps it ran in


class Encoded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    request_id: str
    rows: list[bytes]  # float32 little-endian, one for each sequence
    prompt_tokens: int
    device_s: float = 0.0  # this request's share of the batches it was in


class AdapterLoaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to `LoadAdapter` and `UnloadAdapter`: what is loaded now."""

    request_id: str
    adapters: tuple[str, ...] = ()
    rank: int = 0
    num_parameters: int = 0


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request that was not finished. `code` is an OpenAI error code where one fits."""

    request_id: str
    message: str
    is_user_error: bool
    code: str | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    request_id: str = ""
    num_running: int = 0
    num_waiting: int = 0
    kv_pages_total: int = 0
    kv_pages_used: int = 0  # referenced by a sequence; cached but unreferenced pages are free
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generation_tokens_total: int = 0
    requests_total: int = 0
    requests_cancelled_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    drafts_total: int = 0  # times that a sequence carried guessed tokens in a step
    draft_tokens_total: int = 0
    accepted_draft_tokens_total: int = 0
    undrafted_requests_total: int = 0  # with a grammar: they run without guesses
    busy_s: float = 0.0


class Loading(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Progress of a load: done and total in bytes (or in steps of `stage`)."""

    stage: str
    done: int
    total: int


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent once, when the replica is ready."""

    kind: Literal["decoder", "embedder", "reranker"]
    family: str
    path: str
    device: str
    chip: str
    dtype: str
    max_context: int
    vocab_size: int
    num_parameters: int
    kv_pages_total: int = 0
    page_tokens: int = 0
    eos_ids: tuple[int, ...] = ()
    native: bool = True  # False: the transformers fallback
    load_s: float = 0.0
    kernels: dict[str, str] = {}  # op -> chosen kernel and why


FromEngine = Delta | Encoded | AdapterLoaded | Failed | EngineStats | Loading | ModelInfo


class EngineClient(Protocol):
    """A replica as a server sees it. mxn's engine process and its test doubles implement this."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def is_healthy(self) -> bool: ...

    def generate(self, request: Generate) -> AsyncIterator[Delta]:
        """Yield deltas until one has a `finish_reason`.

        Closing the iterator early cancels the request and frees its pages at once.
        Raises: UserError subclasses for a bad request, EngineDiedError when the replica died.
        """
        ...

    async def encode(self, request: Encode) -> Encoded: ...

    async def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...
