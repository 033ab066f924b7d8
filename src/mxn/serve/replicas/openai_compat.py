"""CompatEngine: an OpenAI-compatible server as a replica, over token ids.

Prompts go to /v1/completions as token ids. Where the server names the tokens it made, text is made
of them here, exactly as our own engine does; elsewhere its text is taken and counted with the
model's tokenizer (`count_basis` says which). Needs the model's tokenizer; knows no chat.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

from mxn.engine.protocol import Delta, Encode, Encoded, EngineStats, Generate, ModelInfo
from mxn.errors import ConfigError, EngineDiedError, UnsupportedError
from mxn.ledger.types import CountBasis
from mxn.models.tokenizer import Tokenizer
from mxn.serve.replicas.compat_answer import UNREADABLE, Chunk, Made, encoded_of
from mxn.serve.replicas.compat_config import CAPABILITIES, CompatConfig, probe
from mxn.serve.replicas.compat_parameters import NO_PAIRS, CompatParameters
from mxn.serve.replicas.http_client import ConnectionLost, HttpClient
from mxn.serve.replicas.sse import MalformedStream, SseReader, clipped
from mxn.serve.replicas.upstream import KINDS, Upstream, UpstreamConfig, error_of, lost

__all__ = ["CompatConfig", "CompatEngine", "probe"]

_chunk_decoder = msgspec.json.Decoder(Chunk)


class CompatEngine:
    """An `EngineClient` over an OpenAI-compatible server. Make it with `connect`."""

    def __init__(self, config: CompatConfig, tokenizer: Tokenizer) -> None:
        kind = config.kind or "openai"
        if kind not in KINDS:
            raise ConfigError(f"unknown kind of server {kind!r}; one of {', '.join(KINDS)}")
        self.config = config
        self.capabilities = config.capabilities or CAPABILITIES[kind]
        self.tokenizer = tokenizer
        self._kind = kind
        self._upstream = Upstream(
            UpstreamConfig(url=config.url, model=config.model, key=config.key, limits=config.limits)
        )
        self._parameters = CompatParameters(
            name=self._upstream.name,
            model=config.model,
            kind=kind,
            max_context=config.max_context,
            capabilities=self.capabilities,
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

        `resumes`: the request comes with tokens made elsewhere.
        """
        return self._parameters.lacks(request, resumes=resumes)

    async def generate(self, request: Generate) -> AsyncIterator[Delta]:
        """Yield deltas until one has a `finish_reason`; closing the iterator cancels.

        Raises: UnsupportedError for a parameter the server does not have, EngineDiedError.
        """
        answer = Made(request, self.tokenizer, knows_ids="token_ids" in self.capabilities)
        limit = self._parameters.limit(request)
        if request.resume_ids and limit is not None and len(request.resume_ids) >= limit:
            yield answer.at_limit()  # the replica before was lost with its last token sent
            return
        body = msgspec.json.encode(self._parameters.body(request))
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
            raise UnsupportedError(NO_PAIRS)
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
            return encoded_of(request, data)
        except UNREADABLE as exc:
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

    async def _chunks(self, body: bytes) -> AsyncGenerator[Chunk, None]:
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

    def _answered(self) -> None:
        self._is_healthy = True
        self._upstream.succeeded()

    def _lost(self, exc: Exception) -> EngineDiedError:
        self._is_healthy = False
        self._upstream.failed()
        return EngineDiedError(f"the server {self._upstream.name}: {exc}", retry_after_s=1.0)
