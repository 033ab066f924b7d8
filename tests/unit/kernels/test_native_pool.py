"""The threads of native kernels under stress: every item once, no lost wake-up, no hang.

`support/pool_stress.cpp` drives `csrc/pool.cpp` alone, plainly and under ThreadSanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mxn.kernels

CSRC = Path(mxn.kernels.__file__).parent / "csrc"
DRIVER = Path(__file__).parents[2] / "support" / "pool_stress.cpp"
COMPILER = shutil.which("g++") or shutil.which("c++")

pytestmark = [
    pytest.mark.skipif(not CSRC.is_dir(), reason="the sources of the kernels are not installed"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


def build(directory: Path, *flags: str) -> Path | None:
    """Return the compiled driver, or None when the compiler has no such sanitizer."""
    out = directory / "pool_stress"
    command = [str(COMPILER), "-std=c++20", "-Wall", "-Wextra", "-Werror", *flags, f"-I{CSRC}"]
    command += [str(DRIVER), str(CSRC / "pool.cpp"), "-o", str(out), "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode and "-fsanitize=thread" in flags and "tsan" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    path = build(tmp_path_factory.mktemp("plain"), "-O2")
    assert path is not None
    return path


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> Path:
    path = build(tmp_path_factory.mktemp("tsan"), "-O1", "-g", "-fsanitize=thread")
    if path is None:
        pytest.skip("the compiler has no ThreadSanitizer")
    return path


def drive(driver: Path, mode: str, rounds: int, timeout: float = 60) -> None:
    done = subprocess.run(
        [driver, mode, str(rounds)], capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# Items that wait for each other (`meet`) are what a lost wake-up would hang.
ROUNDS = {
    "short": 300, "uneven": 10, "meet": 40, "destroyed": 200, "callers": 2000, "forks": 30,
}  # fmt: skip


@pytest.mark.parametrize("mode", ROUNDS)
def test_every_item_runs_once(plain, mode):
    drive(plain, mode, ROUNDS[mode])


@pytest.mark.parametrize("mode", ["short", "uneven", "meet", "destroyed", "callers"])
def test_thread_sanitizer_finds_no_race(checked, mode):
    drive(checked, mode, {"meet": 10}.get(mode, max(5, ROUNDS[mode] // 10)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ROUNDS)
def test_every_item_runs_once_in_many_loops(plain, mode):
    drive(plain, mode, ROUNDS[mode] * 20, timeout=280)


@pytest.mark.skipif(sys.platform != "linux", reason="binds a process to one core")
def test_a_thread_that_gets_no_time_delays_and_loses_nothing(plain):
    core = max(os.sched_getaffinity(0))
    busy = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"],
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        stdout=subprocess.PIPE,
    )
    try:
        assert busy.stdout is not None
        busy.stdout.readline()  # it runs by now
        drive(plain, "pinned", 60)
        drive(plain, "uneven", 3)
    finally:
        busy.kill()
        busy.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory")
def test_threads_that_cannot_be_started_are_an_error_and_not_the_end():
    from mxn.kernels.native import missing_reason

    if missing_reason() is not None:
        pytest.skip(str(missing_reason()))
    code = """
import resource
from mxn.errors import CapacityError
from mxn.kernels.native import library, pool
library()
pages = int(open("/proc/self/statm").read().split()[0])
room = pages * resource.getpagesize() + (100 << 20)  # a thread's stack takes some MiB of it
resource.setrlimit(resource.RLIMIT_AS, (room, room))
for _ in range(3):
    try:
        pool(4000)
    except CapacityError as error:
        assert "4000 threads" in str(error) and "MXN_THREADS" in str(error), error
    else:
        raise SystemExit("4000 threads started")
assert pool(2).num_threads == 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_products_in_the_child_of_a_fork_end_and_are_right():
    from mxn.kernels.native import missing_reason

    if missing_reason() is not None:
        pytest.skip(str(missing_reason()))
    code = """
import os, torch
from mxn.kernels.native import formats, pool
from mxn.kernels.native.pack import pack
x, w = torch.randn(40, 64), pack(torch.randn(48, 64), formats.INT8)
def product():
    y = torch.empty(40, 48)
    from mxn.kernels.native import library
    library().linear(pool(4), w.handle, x.data_ptr(), 64, 40, y.data_ptr(), 48, 0)
    return y
want = product()
child = os.fork()
if child == 0:
    raise SystemExit(0 if torch.equal(product(), want) else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
