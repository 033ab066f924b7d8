"""Server-sent events of OpenAI-compatible servers, cut out of bytes that arrive in any pieces.

Knows the shape of chunks as far as a gateway needs it; what it does not know passes through.
"""

from __future__ import annotations

from typing import Any

import msgspec

MAX_QUOTED_CHARS = 200  # of what a foreign server says
_RAW_NULL = msgspec.Raw(b"null")


class UpstreamUsage(msgspec.Struct):
    """Counts as a foreign server wrote them, unchecked: see `counting.told_of`."""

    prompt_tokens: Any = None
    completion_tokens: Any = None
    prompt_tokens_details: Any = None
    completion_tokens_details: Any = None

    @property
    def cached_tokens(self) -> Any:
        return _detail(self.prompt_tokens_details, "cached_tokens")

    @property
    def reasoning_tokens(self) -> Any:
        return _detail(self.completion_tokens_details, "reasoning_tokens")


def _detail(details: Any, name: str) -> Any:
    return details.get(name) if isinstance(details, dict) else None


class Choice(msgspec.Struct):
    index: int = 0
    delta: msgspec.Raw = _RAW_NULL
    text: str | None = None  # completions
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    """One event. `error` is set where a server reports a failure inside the stream."""

    id: str | None = None
    model: str | None = None
    choices: list[Choice] = []
    usage: UpstreamUsage | None = None
    error: Any = None


class Batch(msgspec.Struct):
    """The events of one read: `blocks[i]` are the bytes of `chunks[i]`, without the blank line."""

    blocks: list[bytes]
    chunks: list[Chunk]
    is_done: bool  # `[DONE]` was among them
    problem: str | None = None  # what came after them: a failure, or what is no event


class MalformedStream(Exception):
    """A stream that is none, reports a failure, or ends before its answer."""


_decoder = msgspec.json.Decoder(Chunk)


class SseReader:
    """Feed bytes, get batches of whole events; what is incomplete waits for the next piece.

    Each byte is looked at a fixed number of times, however small the pieces of a long event are.
    """

    def __init__(self, max_event_bytes: int = 4 << 20) -> None:
        self._rest = bytearray()  # holds no blank line
        self._has_cr = False  # the last byte was a CR, which waits for its LF
        self._max_event_bytes = max_event_bytes

    def feed(self, data: bytes) -> Batch:
        """Return the events that are complete now. Raises: MalformedStream for one without end."""
        if self._has_cr or b"\r" in data:  # some servers end lines as HTTP does
            data = self._without_cr(data)
        rest = self._rest
        if rest and (b"\n\n" in data or (rest[-1:] == data[:1] == b"\n")):
            data, self._rest = bytes(rest + data), bytearray()
            rest = self._rest
        elif rest:
            rest += data
            data = b""
        head, found, tail = data.rpartition(b"\n\n")
        rest += tail
        if len(rest) > self._max_event_bytes:
            raise MalformedStream(f"an event of more than {self._max_event_bytes} bytes")
        return self._parse(head.split(b"\n\n")) if found else Batch([], [], False)

    def finish(self) -> Batch:
        """Return what the end of the stream completes: a last event without its blank line."""
        rest, self._rest = bytes(self._rest).strip(), bytearray()
        return self._parse([rest]) if rest else Batch([], [], False)

    def _without_cr(self, data: bytes) -> bytes:
        data = b"\r" + data if self._has_cr else data
        self._has_cr = data.endswith(b"\r")
        data = data[:-1] if self._has_cr else data
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _parse(self, raw: list[bytes]) -> Batch:
        batch = Batch([], [], False)
        decode = _decoder.decode
        for block in raw:
            data = block[6:] if block.startswith(b"data: ") and b"\n" not in block else _data(block)
            if not data:
                continue  # a comment, such as a heartbeat
            if data == b"[DONE]":
                batch.is_done = True
                continue
            try:
                chunk = decode(data)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
                # Nothing of the data itself: it may be a piece of somebody's answer.
                batch.problem = f"sent {len(data)} bytes that are no event ({clipped(exc)})"
                return batch
            if chunk.error is not None:
                batch.problem = f"reported {_reported(chunk.error)}"
                return batch
            if not all(_is_object(choice.delta) for choice in chunk.choices):
                batch.problem = "sent a delta that is no object"
                return batch
            batch.chunks.append(chunk)
            batch.blocks.append(block if len(data) + 6 == len(block) else b"data: " + data)
        return batch


def clipped(value: object) -> str:
    """Return the beginning of what a foreign server says, for messages and logs."""
    text = str(value)
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[:MAX_QUOTED_CHARS]}…"


def _reported(error: Any) -> str:
    """Return an error event's message, quoted; of other shapes only what they are."""
    if isinstance(error, dict):
        error = error.get("message") or error.get("code")
    return repr(clipped(error)) if isinstance(error, str | int) else "an error"


def _is_object(delta: msgspec.Raw) -> bool:
    data = bytes(memoryview(delta)[:1])
    return data == b"{" or bytes(delta) == b"null"


def _data(block: bytes) -> bytes:
    """Return the data of an event that has other lines too, or several lines of data."""
    lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line[:5] == b"data:"]
    return b"\n".join(lines)


class Renamer:
    """Puts our id and our model's name into events, in whatever notation the server writes them.

    A server repeats both in every event, so the bytes to replace are found once; an event that
    has others is taken apart.
    """

    def __init__(self, answer_id: str, model: str) -> None:
        self._id = msgspec.Raw(msgspec.json.encode(answer_id))
        self._model = msgspec.Raw(msgspec.json.encode(model))
        self._seen: tuple[str | None, str | None] | None = None
        self._pairs: list[tuple[bytes, bytes]] = []

    def rename(self, batch: Batch, first: int = 0) -> bytes:
        """Return the events of a batch from `first` on as bytes, each with its blank line."""
        if not batch.blocks:
            return b""
        if self._seen is None:
            self._learn(batch.chunks[0], batch.blocks[0])
        seen_id, seen_model = self._seen or (None, None)
        if self._pairs and all(
            chunk.id == seen_id and chunk.model == seen_model for chunk in batch.chunks
        ):
            blocks = batch.blocks[first:] if first else batch.blocks
            joined = b"\n\n".join(blocks) + b"\n\n" if blocks else b""
            if all(joined.count(old) == len(blocks) for old, _ in self._pairs):
                for old, new in self._pairs:
                    joined = joined.replace(old, new)
                return joined
        return b"".join(self._slowly(block) for block in batch.blocks[first:])

    def _learn(self, chunk: Chunk, block: bytes) -> None:
        self._seen = (chunk.id, chunk.model)
        pairs = []
        for name, value, new in (("id", chunk.id, self._id), ("model", chunk.model, self._model)):
            if not value:
                return
            for gap in (b"", b" "):
                old = b'"%b":%b%b' % (name.encode(), gap, msgspec.json.encode(value))
                if block.count(old) == 1:
                    pairs.append((old, b'"%b":%b' % (name.encode(), bytes(new))))
                    break
            else:
                return
        self._pairs = pairs

    def _slowly(self, block: bytes) -> bytes:
        fields = msgspec.json.decode(block[6:], type=dict[str, msgspec.Raw])
        if "error" not in fields:
            fields["id"], fields["model"] = self._id, self._model
        return b"data: " + msgspec.json.encode(fields) + b"\n\n"
