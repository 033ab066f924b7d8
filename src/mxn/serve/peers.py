"""Workers of one gateway tell each other what they counted, since a scrape reaches only one.

Each has a Unix socket that the parent bound before the fork, so only processes of this gateway's
user reach it. Whoever connects is told everything and the connection closes. Counts are not added
up here: a worker that starts again begins at zero, which only its own series may show. Start at
`Peers.ask`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec

from mxn.errors import ConfigError
from mxn.serve.replica_status import ReplicaStatus

log = logging.getLogger("mxn.serve")

_ANSWER_S = 1.0  # a worker that is busy for longer, or starts again, is missing from one scrape
_FAMILY = re.compile(r"^# HELP (\S+) .*\n(?:.+\n)*?(?=# HELP |\Z)", re.MULTILINE)


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker knows. `queued`: model → requests that wait there for a replica."""

    metrics: str
    queued: dict[str, int]
    replicas: list[ReplicaStatus]


class Peers:
    """The workers of a gateway, seen from one of them."""

    def __init__(self, sockets: list[socket.socket], index: int) -> None:
        self._sockets = sockets
        self.index = index
        self._server: asyncio.Server | None = None

    async def listen(self, tell: Callable[[], Awaitable[Told]]) -> None:
        """Answer the others from now on."""

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):  # who asked has given up
                writer.write(msgspec.msgpack.encode(await tell()))
                await writer.drain()
            writer.close()

        self._server = await asyncio.start_unix_server(answer, sock=self._sockets[self.index])

    async def ask(self, own: Told) -> dict[int, Told]:
        """Return what every worker that answers knows, by number."""
        others = [index for index in range(len(self._sockets)) if index != self.index]
        answers = await asyncio.gather(*(self._ask(index) for index in others))
        found = {self.index: own}
        found.update((i, told) for i, told in zip(others, answers, strict=True) if told)
        return dict(sorted(found.items()))

    async def _ask(self, index: int) -> Told | None:
        try:
            async with asyncio.timeout(_ANSWER_S):
                path = self._sockets[index].getsockname()
                reader, writer = await asyncio.open_unix_connection(path)
                try:
                    return msgspec.msgpack.decode(await reader.read(), type=Told)
                finally:
                    writer.close()
        except (TimeoutError, OSError, msgspec.MsgspecError) as error:
            log.warning("worker %d does not say what it counted: %r", index, error)
            return None


def bind_all(folder: Path, count: int) -> list[socket.socket]:
    """Return a bound socket for each worker. Raises: ConfigError for a folder that cannot do it."""
    sockets = []
    for index in range(count):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(str(folder / str(index)))
        except OSError as error:
            raise ConfigError(
                f"workers cannot have sockets in {folder}: {error}",
                hint="set TMPDIR to a short path on a local disk",
            ) from error
        sockets.append(sock)
    return sockets


def merge_metrics(texts: Mapping[int, str]) -> bytes:
    """Return one text in which every sample has the label `worker`, families in one piece each."""
    families: dict[str, list[str]] = {}
    for index, text in texts.items():
        for match in _FAMILY.finditer(text):
            lines = match[0].splitlines()
            kept = families.setdefault(match[1], [line for line in lines if line.startswith("#")])
            kept += [_labelled(line, index) for line in lines if not line.startswith("#")]
    return "".join(f"{line}\n" for lines in families.values() for line in lines).encode()


def _labelled(line: str, index: int) -> str:
    name, found, rest = line.partition("{")
    if found:
        return f'{name}{{worker="{index}",{rest}'
    name, _, value = line.partition(" ")
    return f'{name}{{worker="{index}"}} {value}'


def merge_replicas(told: Mapping[int, Told], index: int) -> list[ReplicaStatus]:
    """Return the replicas as worker `index` sees them, with what all have counted."""
    made: dict[tuple[str, str], list[int]] = {}
    for item in told.values():
        for row in item.replicas:
            sums = made.setdefault((row.model, row.name), [0, 0, 0])
            for at, value in enumerate((row.tokens, row.lost, row.running)):
                sums[at] += value
    rows = []
    for row in told[index].replicas:
        tokens, lost, running = made[row.model, row.name]
        # Our own replicas say how busy they are in all; of foreign ones each knows its requests.
        running = running if row.waiting is None else row.running
        rows.append(msgspec.structs.replace(row, tokens=tokens, lost=lost, running=running))
    return rows
