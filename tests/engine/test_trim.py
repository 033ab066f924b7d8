"""Memory that loading left free goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Small pieces, every tenth of them kept: freeing the rest gives nothing back by itself.
PROGRAM = """
import ctypes
from mxn.engine.trim import trim, trim_beside

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

pieces = [libc.malloc(60_000) for _ in range(1000)]
for piece in pieces:
    ctypes.memset(piece, 1, 60_000)
for i, piece in enumerate(pieces):
    if i % 10 != 9:
        libc.free(piece)
before = resident()
trim_beside().join()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can give memory back")
def test_free_pieces_go_back_to_the_system() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 40_000_000
