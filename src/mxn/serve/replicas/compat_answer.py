"""What an OpenAI-compatible server answers, as deltas and vectors.

Knows the JSON of /v1/completions and /v1/embeddings; knows no connection and no parameters.
Start at `Made.push` (streams) and `encoded_of` (vectors).
"""

from __future__ import annotations

import base64
import struct
from typing import Any

import msgspec

from mxn.engine.detokenize import StreamDetokenizer, byte_fallback_ids
from mxn.engine.protocol import (
    Delta,
    Encode,
    Encoded,
    FinishReason,
    Generate,
    SamplingParams,
    TokenLogprob,
)
from mxn.errors import EngineDiedError
from mxn.models.tokenizer import Tokenizer
from mxn.serve.replicas.counting import told_of
from mxn.serve.replicas.sse import MalformedStream, UpstreamUsage

# What reading a foreign server's JSON may raise when it is not of the shape it should be.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, AttributeError,
               IndexError, KeyError, TypeError, ValueError, struct.error)  # fmt: skip
_MAX_ID = 1 << 31


class Choice(msgspec.Struct):
    """One choice of a chunk, as /v1/completions streams it."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    logprobs: dict[str, Any] | None = None


class Chunk(msgspec.Struct):
    """One event of the stream."""

    choices: list[Choice] = []
    usage: UpstreamUsage | None = None
    error: Any = None


class Made:
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

    def push(self, chunk: Chunk) -> Delta | None:
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


def _logprobs(choice: Choice, sampling: SamplingParams) -> list[TokenLogprob] | None:
    """Read log-probabilities whose tokens are written as `token_id:123`."""
    if sampling.logprobs is None or choice.logprobs is None:
        return None
    try:
        return _read_logprobs(choice.logprobs, sampling.logprobs)
    except UNREADABLE as exc:
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


def encoded_of(request: Encode, data: bytes) -> Encoded:
    """Return the vectors of a body of /v1/embeddings, in the order of the request.

    Raises: one of UNREADABLE for another shape, EngineDiedError for another number of them.
    """
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
