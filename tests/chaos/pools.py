"""Two ways to run replicas of one model, and how to hit one of them.

`Remote`: a gateway before servers of their own. `Local`: engine processes inside one server. A hit
is a SIGKILL, a SIGSTOP that ends after a while, or a SIGSTOP that ends with a SIGKILL.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import httpx
import psutil

from chaos.processes import REPLICA_KEY, START_LIMIT_S, Server, gateway, replica

MODEL = Path(__file__).parents[2] / "src/mxn/shipped/mxn-shakespeare-llama"
_LOOK_S = 0.1


class Pool(Protocol):
    """Replicas behind one address."""

    @property
    def url(self) -> str: ...

    @property
    def loads(self) -> list[tuple[str, str]]:
        """(address, key) of every server whose /load says what runs there."""
        ...

    @property
    def most_kills(self) -> int:
        """How many may be dead at the same time."""
        ...

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def kill(self, replica: str) -> None: ...

    def pause(self, replica: str) -> None: ...

    def resume(self, replica: str) -> None: ...

    def make_whole(self) -> None:
        """Return when every replica that was hit works again."""
        ...


@dataclass(slots=True)
class Remote:
    """A gateway in front of `num_replicas` servers; a replica is named by its address."""

    home: Path
    database: str
    key: str
    num_replicas: int
    stall_limit_s: float
    front: Server = field(init=False)
    servers: dict[str, Server] = field(init=False)
    _restarts: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        made = [
            replica(f"replica{number}", MODEL, self.home, "--dtype", "float32")
            for number in range(self.num_replicas)
        ]
        self.servers = {f"127.0.0.1:{server.port}": server for server in made}
        limit = str(self.stall_limit_s)
        self.front = gateway("gateway", made, self.database, self.home, "--stall-limit", limit)

    @property
    def url(self) -> str:
        return self.front.url

    @property
    def loads(self) -> list[tuple[str, str]]:
        servers = [(server.url, REPLICA_KEY) for server in self.servers.values()]
        return [*servers, (self.url, self.key)]

    @property
    def most_kills(self) -> int:
        return self.num_replicas - 1

    def start(self) -> None:
        for server in (*self.servers.values(), self.front):
            server.start()
        for server in (*self.servers.values(), self.front):
            server.wait()
        # /health is good when one replica is in; a run begins with all of them.
        until_s = time.monotonic() + START_LIMIT_S
        pages = sum(_pages(server.url, REPLICA_KEY) for server in self.servers.values())
        while _pages(self.url, self.key) < pages:
            assert time.monotonic() < until_s, self.front.log.read_text()[-3000:]
            time.sleep(_LOOK_S)

    def stop(self) -> None:
        for thread in self._restarts:
            thread.join()
        for server in self.servers.values():
            if server.process is not None and server.process.poll() is None:
                os.killpg(server.process.pid, signal.SIGCONT)
        for server in (self.front, *self.servers.values()):
            server.stop()

    def kill(self, replica: str) -> None:
        server = self.servers[replica]
        server.kill()
        thread = threading.Thread(target=server.start)  # a fork must not hold up the clients
        thread.start()
        self._restarts.append(thread)

    def pause(self, replica: str) -> None:
        self._signal(replica, signal.SIGSTOP)

    def resume(self, replica: str) -> None:
        self._signal(replica, signal.SIGCONT)

    def make_whole(self) -> None:
        for thread in self._restarts:
            thread.join()
        self._restarts.clear()
        for server in self.servers.values():
            server.wait()

    def _signal(self, replica: str, number: signal.Signals) -> None:
        process = self.servers[replica].process
        assert process is not None
        os.killpg(process.pid, number)


@dataclass(slots=True)
class Local:
    """One server with engine processes, named `m-0`, `m-1` and so on."""

    home: Path
    database: str
    key: str
    num_replicas: int
    stall_limit_s: float
    server: Server = field(init=False)
    _pids: dict[str, int] = field(default_factory=dict)
    _num_kills: int = 0
    _all_pages: int = 0
    _gone: list[str] = field(default_factory=list)  # killed since all were there

    # An engine that dies five times in ten minutes stays down; the server is new before that.
    _MOST_KILLS = 4

    def __post_init__(self) -> None:
        self.server = Server(
            "server",
            [
                "serve", str(MODEL), "--name", "m", "--dtype", "float32", "--device", "cpu",
                "--replicas", str(self.num_replicas), "--threads", "1",
                "--database", self.database, "--stall-limit", str(self.stall_limit_s),
            ],
            self.home,
        )  # fmt: skip

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def loads(self) -> list[tuple[str, str]]:
        return [(self.server.url, self.key)]

    @property
    def most_kills(self) -> int:
        return 1  # so that an engine which comes back is known by the one that was gone

    def start(self) -> None:
        self.server.start()
        self.server.wait()
        self._num_kills = 0
        self._gone.clear()
        self._pids = {f"m-{at}": pid for at, pid in enumerate(self._engines())}
        assert len(self._pids) == self.num_replicas, self._pids
        self._all_pages = _pages(self.url, self.key)

    def stop(self) -> None:
        for pid in self._engines():
            os.kill(pid, signal.SIGCONT)
        self.server.stop()

    def kill(self, replica: str) -> None:
        self._num_kills += 1
        self._gone.append(replica)
        os.kill(self._pids[replica], signal.SIGKILL)

    def pause(self, replica: str) -> None:
        os.kill(self._pids[replica], signal.SIGSTOP)

    def resume(self, replica: str) -> None:
        os.kill(self._pids[replica], signal.SIGCONT)

    def make_whole(self) -> None:
        if self._num_kills >= self._MOST_KILLS:
            self.stop()
            self.start()
            return
        until_s = time.monotonic() + START_LIMIT_S
        while self._gone:
            new = [pid for pid in self._engines() if pid not in self._pids.values()]
            if new and _pages(self.url, self.key) >= self._all_pages:
                self._pids[self._gone.pop()] = new[-1]
                return
            assert time.monotonic() < until_s, self.server.log.read_text()[-3000:]
            time.sleep(_LOOK_S)

    def _engines(self) -> list[int]:
        """Return the engines' process ids in the order of their start."""
        assert self.server.process is not None
        if self.server.process.poll() is not None:
            return []
        found = psutil.Process(self.server.process.pid).children(recursive=True)
        engines = [item for item in found if _is_engine(item)]
        return [item.pid for item in sorted(engines, key=lambda p: (p.create_time(), p.pid))]


def _pages(url: str, key: str) -> int:
    """Return all KV pages of the replicas behind an address; 0 while it does not answer."""
    try:
        answer = httpx.get(f"{url}/load", headers={"authorization": f"Bearer {key}"}, timeout=3)
    except httpx.HTTPError:
        return 0
    model = answer.json()["models"].get("m") if answer.status_code == 200 else None
    return model["kv_pages_total"] if model else 0


def _is_engine(process: psutil.Process) -> bool:
    try:
        return "mxn.engine.process" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False  # it has just ended
