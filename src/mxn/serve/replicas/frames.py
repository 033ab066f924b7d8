"""Messages of the replica protocol on the wire: length-prefixed MessagePack arrays.

A frame is four bytes of length, big-endian, and an array of messages; an empty array only says that
the sender is alive. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from mxn.engine.protocol import ENDED_CODE, AdapterLoaded, Delta, Encoded, Failed
from mxn.errors import CapacityError, EngineDiedError, MxnError, UserError

Answered = Delta | Encoded | AdapterLoaded | Failed
MEDIA_TYPE = "application/vnd.mxn.frames"
MAX_FRAME_BYTES = 256 << 20

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Answered])


def pack(messages: Sequence[Answered]) -> bytes:
    """Return one frame that holds `messages`."""
    body = _encoder.encode(messages)
    return len(body).to_bytes(4, "big") + body


class Unpacker:
    """Bytes in any pieces in, messages out."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[list[Answered]]:
        """Yield the messages of each frame that is complete now.

        Raises: msgspec.MsgspecError, ValueError for what is no frame.
        """
        self._buffer += data
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "big")
            if size > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {size} bytes; the limit is {MAX_FRAME_BYTES}")
            if len(self._buffer) < 4 + size:
                return
            frame = bytes(self._buffer[4 : 4 + size])
            del self._buffer[: 4 + size]
            yield _decoder.decode(frame)


def failed_of(request_id: str, error: MxnError) -> Failed:
    """Return the message that `mxn.engine.client.error_of` turns into such an error again."""
    code = error.code
    if isinstance(error, EngineDiedError):
        code = ENDED_CODE
    elif isinstance(error, CapacityError):
        code = code or "context_length_exceeded"
    return Failed(
        request_id=request_id,
        message=str(error),
        is_user_error=isinstance(error, UserError),
        code=code,
    )
