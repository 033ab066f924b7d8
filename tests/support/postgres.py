"""A PostgreSQL server of our own for tests: in a temporary folder, on a socket there, no network.

It can be killed and started again. Durability is switched on as in production unless a test asks
for `is_fast`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

_FOLDERS = (
    "/usr/lib/postgresql/15/bin",
    "/usr/lib/postgresql/16/bin",
    "/usr/lib/postgresql/17/bin",
)


def find_binaries() -> Path | None:
    """Return the folder of initdb and pg_ctl, or None."""
    for folder in _FOLDERS:
        if (Path(folder) / "initdb").exists():
            return Path(folder)
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


class Postgres:
    """A server that runs from `start` to `stop`; `url` names its database."""

    def __init__(self, *, is_fast: bool = True) -> None:
        binaries = find_binaries()
        if binaries is None:
            raise FileNotFoundError("no initdb: install PostgreSQL to run these tests")
        self._binaries = binaries
        self.folder = Path(tempfile.mkdtemp(prefix="mxn-pg-"))  # short: it holds a socket
        self._user = _unprivileged() if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(self.folder, self._user.pw_uid, self._user.pw_gid)
        self._call("initdb", "-D", str(self.data), "-A", "trust", "-U", "mxn", "-N", "-E", "UTF8")
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(f"listen_addresses = ''\nunix_socket_directories = '{self.folder}'\n")
            file.write("max_connections = 60\nshared_buffers = 16MB\n")
            file.write("fsync = off\n" if is_fast else "")

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://mxn@/postgres?host={quote(str(self.folder))}"

    def start(self) -> None:
        """Start the server and wait until it answers.

        After `kill` its sessions live on for a moment, and a new server refuses to start beside
        them, so it is tried again for a while.
        """
        log = str(self.folder / "log")
        give_up_s = time.monotonic() + 20
        while True:
            try:
                self._call("pg_ctl", "-D", str(self.data), "-l", log, "-w", "-t", "20", "start")
                return
            except RuntimeError:
                if time.monotonic() > give_up_s:
                    raise
                time.sleep(0.2)

    def stop(self, mode: str = "fast") -> None:
        """Stop the server; `immediate` leaves it as a crash would."""
        self._call("pg_ctl", "-D", str(self.data), "-m", mode, "-w", "-t", "20", "stop")

    def kill(self) -> None:
        """End the server with SIGKILL, as when the machine fails."""
        pid = int((self.data / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, signal.SIGKILL)

    def remove(self) -> None:
        if (self.data / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _call(self, name: str, *arguments: str) -> None:
        """Run a program of PostgreSQL, which refuses to be run by root."""
        user = self._user
        drop = {} if user is None else {
            "user": user.pw_uid, "group": user.pw_gid, "extra_groups": [],
            "env": {"PATH": os.environ.get("PATH", ""), "HOME": str(self.folder), "LC_ALL": "C"},
        }  # fmt: skip
        # To a file: the server inherits it, and a pipe would never come to its end.
        with (self.folder / f"{name}.out").open("w+") as output:
            done = subprocess.run(
                [str(self._binaries / name), *arguments], cwd=self.folder, timeout=60,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, **drop,
            )  # fmt: skip
            output.seek(0)
            if done.returncode:
                raise RuntimeError(f"{name} failed with {done.returncode}:\n{output.read()}")


def _unprivileged() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise RuntimeError("neither a user postgres nor nobody, and PostgreSQL refuses to run as root")
