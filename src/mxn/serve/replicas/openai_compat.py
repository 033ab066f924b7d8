"""CompatEngine: an OpenAI-compatible server as a replica, over token ids.

Prompts go to /v1/completions as token ids. Where the server names the tokens it made, text is made
of them here, exactly as our own engine does; elsewhere its text is taken and counted with the
model's tokenizer (`count_basis` says which). Needs the model's tokenizer; knows no chat.
"""

from __future__ import annotations

import base64
import contextlib
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from mxn.engine.detokenize import StreamDetokenizer, byte_fallback_ids
from mxn.engine.protocol import (
    Delta,
    Encode,
    Encoded,
    EngineStats,
    FinishReason,
    Generate,
    ModelInfo,
    SamplingParams,
    TokenLogprob,
)
from mxn.errors import ConfigError, EngineDiedError, UnsupportedError
from mxn.ledger.types import CountBasis
from mxn.models.tokenizer import Tokenizer
from mxn.serve.replicas.counting import told_of
from mxn.serve.replicas.http_client import ConnectionLost, HttpClient, HttpLimits
from mxn.serve.replicas.sse import MalformedStream, SseReader, UpstreamUsage, clipped
from mxn.serve.replicas.upstream import KINDS, Kind, Upstream, UpstreamConfig, error_of, lost

_BASICS = frozenset({"temperature", "top_p", "seed", "stop", "frequency_penalty",
                     "presence_penalty", "logit_bias", "max_tokens"})  # fmt: skip
_OPEN = _BASICS | {"top_k", "min_p", "ignore_eos"}
_VLLM = _OPEN | {"repetition_penalty", "min_tokens", "stop_token_ids", "skip_special_tokens",
                 "include_stop_str", "token_ids", "logprobs", "continuous_usage"}  # fmt: skip
_CAPABILITIES: dict[Kind, frozenset[str]] = {
    "openai": _BASICS,
    "mindie": _BASICS,
    "llama.cpp": _OPEN | {"repetition_penalty"},
    "sglang": _OPEN | {"repetition_penalty", "min_tokens", "stop_token_ids", "skip_special_tokens"},
    "vllm": _VLLM,
    "mxn": _VLLM - {"token_ids", "logprobs", "continuous_usage"},
}
# Names of our parameters in the body, where they differ.
_NAMES = {"include_stop_str": "include_stop_str_in_output"}
_LLAMA_NAMES = {"repetition_penalty": "repeat_penalty"}
_OWNERS: dict[str, Kind] = {
    "vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp", "mxn": "mxn",
}  # fmt: skip
# What reading a foreign server's JSON may raise when it is not of the shape it should be.
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, AttributeError,
               IndexError, KeyError, TypeError, ValueError, struct.error)  # fmt: skip
_MAX_ID = 1 << 31
_COUNT_PROMPT = frozenset({"vllm", "mxn", "llama.cpp"})  # for `repetition_penalty`
_NO_PAIRS = "an OpenAI-compatible server does not score token pairs"
_DEFAULT = SamplingParams()
_DEFAULTS = msgspec.to_builtins(_DEFAULT)


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


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    logprobs: dict[str, Any] | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: UpstreamUsage | None = None
    error: Any = None


_chunk_decoder = msgspec.json.Decoder(_Chunk)


class CompatEngine:
    """An `EngineClient` over an OpenAI-compatible server. Make it with `connect`."""

    def __init__(self, config: CompatConfig, tokenizer: Tokenizer) -> None:
        kind = config.kind or "openai"
        if kind not in KINDS:
            raise ConfigError(f"unknown kind of server {kind!r}; one of {', '.join(KINDS)}")
        self.config = config
        self.capabilities = config.capabilities or _CAPABILITIES[kind]
        self.tokenizer = tokenizer
        self._kind = kind
        self._upstream = Upstream(
            UpstreamConfig(url=config.url, model=config.model, key=config.key, limits=config.limits)
        )
        self._is_healthy = True
        self._num_running = 0
        self._totals = {"requests": 0, "cancelled": 0, "prompt": 0, "generated": 0}

    @classmethod
    async def connect(cls, config: CompatConfig, tokenizer: Tokenizer) -> CompatEngine:
        """Ask the server what it is and return a replica.

        Raises: EngineDiedError when it cannot be reached, ConfigError when it does not have the
        model or does not say how long its context is.
        """
        upstream = Upstream(UpstreamConfig(url=config.url, model=config.model, key=config.key))
        try:
            found = await probe(upstream.http, config)
        except ConnectionLost as exc:
            raise lost(upstream, exc) from exc
        finally:
            await upstream.http.close()
        return cls(found, tokenizer)

    @property
    def count_basis(self) -> CountBasis:
        """Where the numbers of tokens in deltas come from."""
        return "server" if "token_ids" in self.capabilities else "counted"

    @property
    def http(self) -> HttpClient:
        return self._upstream.http

    @property
    def info(self) -> ModelInfo:
        eos_id = self.tokenizer.eos_id
        return ModelInfo(
            kind="embedder" if self.config.is_embedder else "decoder",
            family=self._kind,
            path=self.config.model,
            device=self.config.device or self._upstream.name,
            chip=self.config.chip,
            dtype="unknown",
            max_context=self.config.max_context or 0,
            vocab_size=self.tokenizer.vocab_size,
            num_parameters=0,
            eos_ids=() if eos_id is None else (eos_id,),
            native=False,
        )

    @property
    def is_healthy(self) -> bool:
        """Whether the last request reached the server, or its pause after a failure is over."""
        return self._is_healthy or self._upstream.is_healthy

    def lacks(self, request: Generate | Encode, *, resumes: bool = False) -> str | None:
        """Return why the server cannot take a request, in words; None: it can.

        `resumes`: the request comes with tokens made elsewhere, which the server takes for a part
        of the prompt.
        """
        if isinstance(request, Encode):
            return None if request.token_types is None else _NO_PAIRS
        for name in SamplingParams.__struct_fields__:
            value = getattr(request.sampling, name)
            if name == "max_tokens" or value == getattr(_DEFAULT, name):
                continue
            if name not in self.capabilities:
                return self._without(name)
            if resumes and name in self._crossing:
                return f"the server {self._upstream.name} would begin {name!r} anew"
        return None

    @property
    def _crossing(self) -> frozenset[str]:
        """Parameters whose effect spans the tokens made elsewhere and those made here."""
        names = {"frequency_penalty", "presence_penalty"}
        if self._kind not in _COUNT_PROMPT:
            names.add("repetition_penalty")
        if "token_ids" not in self.capabilities:
            names.add("stop")  # it is the server that looks for them, in its own text only
        return frozenset(names)

    async def generate(self, request: Generate) -> AsyncIterator[Delta]:
        """Yield deltas until one has a `finish_reason`; closing the iterator cancels.

        Raises: UnsupportedError for a parameter the server does not have, EngineDiedError.
        """
        answer = _Made(request, self.tokenizer, knows_ids="token_ids" in self.capabilities)
        limit = self._limit(request)
        if request.resume_ids and limit is not None and len(request.resume_ids) >= limit:
            yield answer.at_limit()  # the replica before was lost with its last token sent
            return
        body = msgspec.json.encode(self._body(request))
        self._num_running += 1
        self._totals["requests"] += 1
        is_finished = False
        try:
            try:
                async with contextlib.aclosing(self._chunks(body)) as chunks:
                    async for chunk in chunks:
                        delta = answer.push(chunk)
                        if delta is not None:
                            yield delta
            except MalformedStream as exc:
                raise self._lost(exc) from exc
            except EngineDiedError:
                if not answer.is_finished:
                    raise  # else only counts and the end mark are missing
            last = answer.finish()
            if last is None:
                raise self._lost(MalformedStream("the stream ended before its answer"))
            is_finished = True
            yield last
        finally:
            self._num_running -= 1
            self._totals["prompt"] += answer.prompt_tokens
            self._totals["generated"] += answer.num_tokens
            self._totals["cancelled"] += not is_finished

    async def encode(self, request: Encode) -> Encoded:
        """Return vectors from /v1/embeddings. Raises: UnsupportedError for pairs to score."""
        if request.token_types is not None:
            raise UnsupportedError(_NO_PAIRS)
        body = {
            "model": self.config.model,
            "input": request.sequences,
            "encoding_format": "base64",
        }
        try:
            answer, data = await self.http.fetch(
                "POST", "/v1/embeddings", msgspec.json.encode(body)
            )
        except ConnectionLost as exc:
            raise self._lost(exc) from exc
        if answer.status != 200:
            raise error_of(self._upstream, answer, data)
        self._answered()
        try:
            return _encoded(request, data)
        except _UNREADABLE as exc:
            raise self._lost(MalformedStream("sent vectors of an unknown shape")) from exc

    async def stats(self) -> EngineStats:
        """Return what went through here; the server may have other callers."""
        return EngineStats(
            num_running=self._num_running,
            prompt_tokens_total=self._totals["prompt"],
            generation_tokens_total=self._totals["generated"],
            requests_total=self._totals["requests"],
            requests_cancelled_total=self._totals["cancelled"],
        )

    async def close(self) -> None:
        await self.http.close()

    async def _chunks(self, body: bytes) -> AsyncGenerator[_Chunk, None]:
        answer = None
        try:
            answer = await self.http.open("POST", "/v1/completions", body)
            if answer.status != 200:
                raise error_of(self._upstream, answer, await answer.read())
            self._answered()
            reader = SseReader()
            while True:
                data = await answer.next()
                batch = reader.feed(data) if data else reader.finish()
                for block in batch.blocks:
                    yield _chunk_decoder.decode(block[6:])
                if batch.problem is not None:
                    raise MalformedStream(batch.problem)
                if batch.is_done or not data:
                    return
        except ConnectionLost as exc:
            raise self._lost(exc) from exc
        except (MalformedStream, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise self._lost(MalformedStream(clipped(exc))) from exc
        finally:
            if answer is not None:
                answer.close()

    def _body(self, request: Generate) -> dict[str, Any]:
        """Return the body of a request; what was made already is part of the prompt."""
        prompt = [*request.prompt_ids, *request.resume_ids]
        sampling = request.sampling
        body: dict[str, Any] = {"model": request.adapter or self.config.model, "prompt": prompt}
        body |= self._parameters(sampling)
        limit = self._limit(request)
        if limit is not None:  # their default is 16
            body["max_tokens"] = max(1, limit - len(request.resume_ids))
        if sampling.min_tokens:
            body["min_tokens"] = max(0, sampling.min_tokens - len(request.resume_ids))
        options: dict[str, bool] = {"include_usage": True}
        if "continuous_usage" in self.capabilities:
            options["continuous_usage_stats"] = True
        body |= {"stream": True, "stream_options": options}
        if "token_ids" in self.capabilities:
            body["return_token_ids"] = True
        if sampling.logprobs is not None:
            body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
        return body

    def _limit(self, request: Generate) -> int | None:
        """Return how many tokens an answer may have, with those made already."""
        limit, context = request.sampling.max_tokens, self.config.max_context
        if limit is None and context is not None:
            limit = context - len(request.prompt_ids)
        return limit

    def _parameters(self, sampling: SamplingParams) -> dict[str, Any]:
        """Return the parameters that are not at their default. Raises: UnsupportedError."""
        out: dict[str, Any] = {"temperature": sampling.temperature}
        names = _LLAMA_NAMES if self._kind == "llama.cpp" else _NAMES
        for name, value in msgspec.to_builtins(sampling).items():
            if name == "max_tokens" or value == _DEFAULTS.get(name):
                continue
            if name not in self.capabilities:
                raise UnsupportedError(
                    self._without(name), hint="leave it out, or choose another replica"
                )
            out[names.get(name) or name] = value
        if "logit_bias" in out:
            out["logit_bias"] = {str(key): item for key, item in sampling.logit_bias.items()}
        return out

    def _without(self, name: str) -> str:
        return f"the server {self._upstream.name} ({self._kind}) has no parameter {name!r}"

    def _answered(self) -> None:
        self._is_healthy = True
        self._upstream.succeeded()

    def _lost(self, exc: Exception) -> EngineDiedError:
        self._is_healthy = False
        self._upstream.failed()
        return EngineDiedError(f"the server {self._upstream.name}: {exc}", retry_after_s=1.0)


class _Made:
    """What a server has made of one request so far."""

    def __init__(self, request: Generate, tokenizer: Tokenizer, *, knows_ids: bool) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self.prompt_tokens = len(request.prompt_ids)
        self.num_tokens = 0
        self._cached_tokens = 0
        self._last: tuple[FinishReason, str | int | None] | None = None
        self._server_tokens: int | None = None
        self._has_begun = False
        sampling = request.sampling
        self._resumed_text = ""
        self._detokenizer: StreamDetokenizer | None = None
        if knows_ids:
            self._detokenizer = StreamDetokenizer(
                tokenizer,
                stop=sampling.stop,
                include_stop_str=sampling.include_stop_str,
                skip_special_tokens=sampling.skip_special_tokens,
                prompt_ids=request.prompt_ids,
                min_tokens=sampling.min_tokens,
                byte_ids=byte_fallback_ids(tokenizer.vocab()),
            )
            self._resumed_text, _ = self._detokenizer.push(request.resume_ids)
        elif request.resume_ids:
            text = tokenizer.decode(request.resume_ids, sampling.skip_special_tokens)
            self._resumed_text = text.rstrip("\ufffd")  # the server completes half a character

    @property
    def is_finished(self) -> bool:
        return self._last is not None

    def at_limit(self) -> Delta:
        """Return the last delta of an answer that had all its tokens before it came here."""
        if self._detokenizer is not None:
            self._resumed_text += self._detokenizer.finish()[0]
        self._last = ("length", None)
        last = self.finish()
        assert last is not None
        return last

    def push(self, chunk: _Chunk) -> Delta | None:
        """Return what a chunk adds; the last piece waits for the counts that follow it.

        Raises: MalformedStream.
        """
        if chunk.usage is not None:
            told = told_of(chunk.usage)
            self._server_tokens, self._cached_tokens = told.output, told.cached
        if not chunk.choices or self._last is not None:
            return None
        choice = chunk.choices[0]
        ids = choice.token_ids
        if ids is None:
            ids = self._tokenizer.encode(choice.text, False) if choice.text else []
        elif not all(0 <= token_id < _MAX_ID for token_id in ids):
            raise MalformedStream("sent what are no token ids")
        self.num_tokens += len(ids)
        text, stop = choice.text, None
        if self._detokenizer is not None:
            text, stop = self._detokenizer.push(ids)
        if choice.finish_reason is not None or stop is not None:
            reason: FinishReason = "length" if choice.finish_reason == "length" else "stop"
            if self._detokenizer is not None and stop is None:
                tail, stop = self._detokenizer.finish()
                text += tail
            self._last = (reason, choice.stop_reason if stop is None else stop)
        if not ids and not text:
            return None
        return self._delta(ids, text, _logprobs(choice, self._request.sampling))

    def finish(self) -> Delta | None:
        """Return the last delta; None when the server has not finished."""
        if self._last is None:
            return None
        delta = self._delta([], "", None)
        return msgspec.structs.replace(
            delta, finish_reason=self._last[0], stop_reason=self._last[1]
        )

    def _delta(self, ids: list[int], text: str, logprobs: list[TokenLogprob] | None) -> Delta:
        first, self._has_begun = not self._has_begun, True
        made = self._server_tokens if self._server_tokens is not None else self.num_tokens
        return Delta(
            request_id=self._request.request_id,
            token_ids=ids,
            text=self._resumed_text + text if first else text,
            logprobs=logprobs,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=min(self._cached_tokens, self.prompt_tokens),
            completion_tokens=len(self._request.resume_ids) + made,
        )


def _logprobs(choice: _Choice, sampling: SamplingParams) -> list[TokenLogprob] | None:
    """Read log-probabilities whose tokens are written as `token_id:123`."""
    if sampling.logprobs is None or choice.logprobs is None:
        return None
    try:
        return _read_logprobs(choice.logprobs, sampling.logprobs)
    except _UNREADABLE as exc:
        raise MalformedStream("sent log-probabilities of an unknown shape") from exc


def _read_logprobs(raw: dict[str, Any], num_top: int) -> list[TokenLogprob]:
    out = []
    tops = raw.get("top_logprobs") or []
    values = zip(raw["tokens"], raw["token_logprobs"], strict=True)
    for at, (token, logprob) in enumerate(values):
        top = (tops[at] or {}) if at < len(tops) else {}
        pairs = sorted(((_id(key), value) for key, value in top.items()), key=lambda item: -item[1])
        out.append(TokenLogprob(_id(token), logprob, pairs[:num_top]))
    return out


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def _encoded(request: Encode, data: bytes) -> Encoded:
    value = msgspec.json.decode(data)
    rows = sorted(value["data"], key=lambda row: row["index"])
    vectors = [_vector(row["embedding"]) for row in rows]
    if len(vectors) != len(request.sequences):
        raise EngineDiedError(f"{len(vectors)} vectors for {len(request.sequences)} sequences")
    count = (value.get("usage") or {}).get("prompt_tokens")
    if count is None:
        count = sum(len(ids) for ids in request.sequences)
    return Encoded(request_id=request.request_id, rows=vectors, prompt_tokens=count)


def _vector(value: str | list[float]) -> bytes:
    if isinstance(value, str):
        return base64.b64decode(value)
    return struct.pack(f"<{len(value)}f", *value)


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
