"""A process of its own that reads a grammar first, because the library may not come back.

An intersection of some dozens of patterns keeps llguidance busy for hours, whatever its limits say,
and a thread in native code cannot be ended. A process can: each grammar gets some seconds of its
processor and a bounded memory. Start at `Checker.problem_of`.

Run as ``python -m mxn.engine.grammar_check``: a `Vocabulary` and then sources come on stdin and
answers go to stdout, each after its length in 4 bytes; it ends with stdin.
"""

from __future__ import annotations

import resource
import select
import struct
import subprocess
import sys
import time
from typing import IO

import msgspec

CPU_S = 2  # of one grammar; a full set of tools takes some hundredths
WALL_S = 20.0  # on a machine that is busy, with the start of the process
_MEMORY = 2 * 2**30
TOO_LONG = "it takes too long to read: intersections and repetitions multiply each other"


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """What a grammar can name of a tokenizer."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: int | None
    eos_ids: list[int]

    def __call__(self, text: bytes | str) -> list[int]:
        """Return tokens of one byte each: nothing here asks for the true ones."""
        data = text.encode() if isinstance(text, str) else text
        found = {token: number for number, token in enumerate(self.tokens) if len(token) == 1}
        return [found.get(bytes((byte,)), 0) for byte in data]


class Checker:
    """Starts the process when it is first needed, and again after one that did not come back.

    Not thread safe.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = msgspec.msgpack.encode(vocabulary)
        self._child: subprocess.Popen[bytes] | None = None

    def problem_of(self, source: str) -> str:
        """Return what is wrong with a grammar in llguidance's own form; empty: nothing."""
        child, is_new = self._child, False
        if child is None or child.poll() is not None:
            is_new = True
            child = self._child = subprocess.Popen(
                [sys.executable, "-m", "mxn.engine.grammar_check"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # the library's panics show the grammar
            )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            if is_new:
                _write(child.stdin, self._vocabulary)
            _write(child.stdin, source.encode())
            # Answers are short, so one that has begun is there.
            is_there, _, _ = select.select((child.stdout,), (), (), WALL_S)
            answer = _read(child.stdout) if is_there else None
        except BrokenPipeError:
            answer = None
        if answer is not None:
            return answer.decode()
        self.close()
        return TOO_LONG

    def close(self) -> None:
        """End the process."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(struct.pack("<I", len(data)) + data)
    file.flush()


def _read(file: IO[bytes]) -> bytes | None:
    """Return the next message, or None at the end."""
    head = file.read(4)
    if len(head) < 4:
        return None
    (length,) = struct.unpack("<I", head)
    data = file.read(length)
    return data if len(data) == length else None


def main() -> None:
    """Answer until stdin ends, or until a grammar takes too much, which ends the process."""
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    from mxn.engine.grammar import LIMITS, problem_at_start

    packed = _read(sys.stdin.buffer)
    if packed is None:
        return
    vocabulary = msgspec.msgpack.decode(packed, type=Vocabulary)
    tokenizer = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=vocabulary.eos_ids or None)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    while (source := _read(sys.stdin.buffer)) is not None:
        limit_s = int(time.process_time()) + CPU_S + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, resource.RLIM_INFINITY))
        try:
            matcher = LLMatcher(tokenizer, source.decode(), log_level=0, limits=LIMITS)
            problem = matcher.get_error() or problem_at_start(
                matcher, len(vocabulary.tokens), vocabulary.eos_ids
            )
        except (ValueError, RuntimeError) as error:
            problem = str(error)
        _write(sys.stdout.buffer, problem[:2000].encode())


if __name__ == "__main__":
    main()
