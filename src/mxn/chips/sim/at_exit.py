"""Let autograd's device threads come to rest before Python shuts down.

torch runs the backward pass of a device in a thread of its own, which drops Python objects a moment
after `backward()` has returned. When the process ends in that moment, Python kills the thread while
it waits for the interpreter lock, and the process aborts ("terminate called without an active
exception"). Real chips rarely end so fast; a test on the simulated chip does.
"""

from __future__ import annotations

import atexit
import time
from pathlib import Path

_AUTOGRAD_THREAD = "pt_autograd"
_SLEEPING = "S"
_POLL_S = 0.001
_QUIET_POLLS = 3  # one could catch a thread between two sleeps
_GIVE_UP_S = 1.0


def register() -> None:
    """Wait at exit, for a few milliseconds and at most a second, if there are such threads."""
    atexit.register(wait_for_autograd)


def wait_for_autograd() -> None:
    """Return once every autograd thread has slept while nobody else needed the interpreter."""
    deadline_s = time.monotonic() + _GIVE_UP_S
    quiet = 0
    while quiet < _QUIET_POLLS and time.monotonic() < deadline_s:
        states = _autograd_thread_states()
        if not states:
            return
        quiet = quiet + 1 if set(states) == {_SLEEPING} else 0
        time.sleep(_POLL_S)  # gives up the interpreter lock, so a thread that needs it goes on


def _autograd_thread_states() -> list[str]:
    """Return the state letters of the autograd threads, from /proc/self/task/*/stat."""
    states = []
    for stat in Path("/proc/self/task").glob("*/stat"):
        try:
            text = stat.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # that thread has ended meanwhile
        name, _, rest = text.partition("(")[2].rpartition(")")
        if name.startswith(_AUTOGRAD_THREAD):
            states.append(rest.split()[0])
    return states
