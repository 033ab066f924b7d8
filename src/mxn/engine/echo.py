"""EchoEngine: a replica without weights, for tests of everything above the engine.

It answers with the prompt's own tokens, in a cycle. Same prompt and seed, same answer. It keeps the
replica contract: closing an iterator cancels, pages are counted, stop strings are held back. Delays
and failures come on request. Never used to serve users.
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import math
import struct
from collections.abc import AsyncIterator
from typing import Literal

import msgspec
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from mxn.engine.protocol import (
    Delta,
    Encode,
    Encoded,
    EngineStats,
    FinishReason,
    Generate,
    ModelInfo,
    TokenLogprob,
)
from mxn.errors import CapacityError, EngineDiedError, UserError
from mxn.models.token_bytes import BYTE_LEVEL
from mxn.models.tokenizer import Tokenizer

PAGE_TOKENS = 16
EMBEDDING_DIM = 8

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """Return a tokenizer where token i is byte i, 256 begins and 257 ends a text."""
    raw = tokenizers.Tokenizer(models.BPE(vocab=BYTE_LEVEL, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    names = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
    raw.add_special_tokens([AddedToken(name, special=True) for name in names])
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": chat_template}
    return Tokenizer.from_tokenizers(raw, config=config)


class EchoEngine:
    """Implements `EngineClient`.

    `first_token_s` and `token_s` are delays; `dies_after` tokens of any request the replica dies;
    `refuses` makes every request fail as the user's fault with that message.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        *,
        kind: Literal["decoder", "embedder", "reranker"] = "decoder",
        max_context: int = 4096,
        kv_pages: int = 4096,
        tokens_per_delta: int = 1,
        first_token_s: float = 0.0,
        token_s: float = 0.0,
        dies_after: int | None = None,
        refuses: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer or byte_tokenizer()
        self.tokens_per_delta = tokens_per_delta
        self.first_token_s = first_token_s
        self.token_s = token_s
        self.dies_after = dies_after
        self.refuses = refuses
        self.seen: list[Generate | Encode] = []  # what arrived, for tests to look at
        self._is_healthy = True
        self._running: dict[str, int] = {}  # request id → pages
        self._counts = {"requests": 0, "cancelled": 0, "prompt": 0, "generated": 0}
        self._info = ModelInfo(
            kind=kind,
            family="echo",
            path="echo",
            device="cpu:0",
            chip="echo",
            dtype="float32",
            max_context=max_context,
            vocab_size=self.tokenizer.vocab_size,
            num_parameters=0,
            kv_pages_total=kv_pages,
            page_tokens=PAGE_TOKENS,
            eos_ids=() if self.tokenizer.eos_id is None else (self.tokenizer.eos_id,),
        )

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def is_healthy(self) -> bool:
        return self._is_healthy

    def die(self) -> None:
        """Behave like a replica whose process ended."""
        self._is_healthy = False

    async def generate(self, request: Generate) -> AsyncIterator[Delta]:
        """Yield the echo of a prompt. Raises: CapacityError, UserError, EngineDiedError."""
        self._admit(request)
        sequence = _Echo(request, self.tokenizer, self._info)
        self._running[request.request_id] = -(-sequence.max_tokens_in_all // PAGE_TOKENS)
        is_finished = False
        try:
            await asyncio.sleep(self.first_token_s)
            resumed = sequence.resume(request.resume_ids)
            while not is_finished:
                self._die_if_due(sequence.num_made)
                delta = resumed if resumed and resumed.finish_reason else None
                if delta is None:
                    delta = sequence.step(self.tokens_per_delta)
                    if resumed is not None:
                        delta = msgspec.structs.replace(delta, text=resumed.text + delta.text)
                resumed = None
                is_finished = delta.finish_reason is not None
                self._counts["generated"] += len(delta.token_ids)
                if is_finished:
                    self._running.pop(request.request_id, None)
                yield delta
                await asyncio.sleep(self.token_s)
        finally:
            self._running.pop(request.request_id, None)
            if not is_finished:
                self._counts["cancelled"] += 1

    async def encode(self, request: Encode) -> Encoded:
        """Return unit vectors, or one logit that counts the words two segments share."""
        self.seen.append(request)
        if self.refuses is not None:
            raise UserError(self.refuses)
        self._running[request.request_id] = 0
        try:
            await asyncio.sleep(self.first_token_s)
            self._die_if_due(0)
        finally:
            self._running.pop(request.request_id, None)
        types = request.token_types or [[0] * len(ids) for ids in request.sequences]
        if self._info.kind == "reranker":
            rows = [_overlap(*pair) for pair in zip(request.sequences, types, strict=True)]
        else:
            rows = [_vector(ids) for ids in request.sequences]
        num_tokens = sum(len(ids) for ids in request.sequences)
        return Encoded(request_id=request.request_id, rows=rows, prompt_tokens=num_tokens)

    async def stats(self) -> EngineStats:
        if not self._is_healthy:
            raise EngineDiedError("the echo engine died")
        return EngineStats(
            num_running=len(self._running),
            kv_pages_total=self._info.kv_pages_total,
            kv_pages_used=sum(self._running.values()),
            prompt_tokens_total=self._counts["prompt"],
            generation_tokens_total=self._counts["generated"],
            requests_total=self._counts["requests"],
            requests_cancelled_total=self._counts["cancelled"],
        )

    async def close(self) -> None:
        self._is_healthy = False

    def _admit(self, request: Generate) -> None:
        self.seen.append(request)
        if not self._is_healthy:
            raise EngineDiedError("the echo engine died")
        if self.refuses is not None:
            raise UserError(self.refuses)
        if len(request.prompt_ids) >= self._info.max_context:
            raise CapacityError(
                f"prompt has {len(request.prompt_ids)} tokens, "
                f"the context is {self._info.max_context}"
            )
        if request.request_id in self._running:
            raise UserError(f"request id {request.request_id!r} is in use")
        self._counts["requests"] += 1
        self._counts["prompt"] += len(request.prompt_ids)

    def _die_if_due(self, num_made: int) -> None:
        if self.dies_after is not None and num_made >= self.dies_after:
            self._is_healthy = False
        if not self._is_healthy:
            raise EngineDiedError("the echo engine died")


class _Echo:
    """One answer in the making: the prompt's tokens from a position the seed chooses."""

    def __init__(self, request: Generate, tokenizer: Tokenizer, info: ModelInfo) -> None:
        self._request = request
        self._tokenizer = tokenizer
        # Half characters wait inside the decoder; what never completes becomes U+FFFD at the end.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        sampling = request.sampling
        room = info.max_context - len(request.prompt_ids)
        self._limit = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        self.max_tokens_in_all = len(request.prompt_ids) + self._limit
        greedy = sampling.temperature == 0
        self._shift = 0 if greedy else (sampling.seed or 0) % len(request.prompt_ids)
        self._held = ""
        self.num_made = 0
        self._finish: FinishReason | None = None
        self._stop_reason: str | int | None = None
        self._eos = set() if sampling.ignore_eos else set(info.eos_ids)

    def resume(self, token_ids: list[int]) -> Delta | None:
        """Make what another replica had made; return its text, without the ids."""
        if not token_ids:
            return None
        made = self.step(len(token_ids))
        return msgspec.structs.replace(made, token_ids=[], logprobs=None)

    def step(self, num_tokens: int) -> Delta:
        """Make up to `num_tokens` tokens and release the text that is decided."""
        first = self.num_made == 0
        ids: list[int] = []
        while len(ids) < num_tokens and self._finish is None:
            self._make(ids)
        sampling = self._request.sampling
        num_prompt = len(self._request.prompt_ids)
        return Delta(
            request_id=self._request.request_id,
            token_ids=ids,
            text=self._release(),
            logprobs=None
            if sampling.logprobs is None
            else [logprob_of(token_id, sampling.logprobs) for token_id in ids],
            prompt_logprobs=None
            if sampling.prompt_logprobs is None or not first
            else self._prompt_logprobs(sampling.prompt_logprobs),
            finish_reason=self._finish,
            stop_reason=self._stop_reason,
            prompt_tokens=num_prompt,
            cached_tokens=(num_prompt - 1) // PAGE_TOKENS * PAGE_TOKENS,
            completion_tokens=self.num_made,
        )

    def _prompt_logprobs(self, count: int) -> list[TokenLogprob | None]:
        rest = self._request.prompt_ids[1:]
        return [None, *(logprob_of(token_id, count) for token_id in rest)]

    def _make(self, ids: list[int]) -> None:
        if self._limit == 0:  # only the prompt was asked about
            self._finish = "length"
            return
        prompt = self._request.prompt_ids
        token_id = prompt[(self._shift + self.num_made) % len(prompt)]
        self.num_made += 1
        ids.append(token_id)
        is_special = token_id in self._tokenizer.special_ids
        if not (is_special and self._request.sampling.skip_special_tokens):
            self._held += self._decoder.decode(self._tokenizer.token_bytes(token_id))
        sampling = self._request.sampling
        if self.num_made <= sampling.min_tokens:
            return
        if token_id in self._eos or token_id in sampling.stop_token_ids:
            self._finish = "stop"
            self._stop_reason = token_id if token_id in sampling.stop_token_ids else None
        elif not self._cut_at_stop() and self.num_made >= self._limit:
            self._finish = "length"

    def _cut_at_stop(self) -> bool:
        stops = self._request.sampling.stop
        places = [(self._held.find(stop), stop) for stop in stops if stop in self._held]
        if not places:
            return False
        at, stop = min(places)
        self._held = self._held[
            : at + (len(stop) if self._request.sampling.include_stop_str else 0)
        ]
        self._finish, self._stop_reason = "stop", stop
        return True

    def _release(self) -> str:
        if self._finish is not None:
            # Text after a stop string is gone, and with it the half character that followed.
            tail = "" if isinstance(self._stop_reason, str) else self._decoder.decode(b"", True)
            text, self._held = self._held + tail, ""
            return text
        keep = max(
            (_overlap_end(self._held, stop) for stop in self._request.sampling.stop), default=0
        )
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap_end(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` could begin `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


def logprob_of(token_id: int, num_top: int) -> TokenLogprob:
    """Return an invented but fixed log-probability; the chosen token is always the best."""
    logprob = -0.1 - (token_id * 31 % 97) / 301
    top = [(token_id, logprob)]
    top += [((token_id + step) % 256, logprob - math.pi * step) for step in range(1, num_top)]
    return TokenLogprob(token_id, logprob, top[:num_top])


def _vector(ids: list[int]) -> bytes:
    digest = hashlib.sha256(repr(ids).encode()).digest()
    values = [(byte - 127.5) / 127.5 for byte in digest[:EMBEDDING_DIM]]
    norm = math.sqrt(sum(value * value for value in values))
    return struct.pack(f"<{EMBEDDING_DIM}f", *(value / norm for value in values))


def _overlap(ids: list[int], types: list[int]) -> bytes:
    first = {token for token, kind in zip(ids, types, strict=True) if kind == 0}
    second = {token for token, kind in zip(ids, types, strict=True) if kind == 1}
    return struct.pack("<f", len(first & second) - 2.0)
