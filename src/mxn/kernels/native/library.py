"""Loads the compiled extension, picks its variant for this processor, and owns the threads."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from mxn import env
from mxn.errors import CapacityError, ConfigError, UnsupportedError

log = logging.getLogger("mxn.kernels")
_num_threads = 1


@cache
def library() -> Any:
    """Return the extension, with the variant that MXN_ISA names or the best for this processor.

    Raises: UnsupportedError when it was not built; ConfigError when MXN_ISA cannot be used here.
    """
    reason = missing_reason()
    if reason is not None:
        raise UnsupportedError(reason, hint="reinstall mxn with a C++ compiler at hand")
    from mxn.kernels import _C

    wanted = env.get("MXN_ISA")
    try:
        _C.use_variant("" if wanted == "auto" else wanted)
    except ValueError as error:
        raise ConfigError(str(error), hint="unset MXN_ISA, or set it to auto") from None
    why = "MXN_ISA" if wanted != "auto" else "the best this processor runs"
    log.info("native kernels: %s (%s)", _C.variant(), why)
    return _C


@cache
def missing_reason() -> str | None:
    """Return why there are no native kernels in this installation, or None."""
    try:
        from mxn.kernels import _C  # noqa: F401
    except ImportError as error:
        return f"the native kernels are not built: {error}"
    return None


def shared_pool() -> Any:
    """Return the threads of this process's decoder, or a caller's own when there is none."""
    return pool(_num_threads)


def use_threads(num_threads: int) -> Any:
    """Make threads for the decoder of this process, which operators then share."""
    global _num_threads
    _num_threads = num_threads
    return pool(num_threads)


@cache
def pool(num_threads: int) -> Any:
    """Return the threads that native kernels share in this process; the caller is one of them.

    Raises: CapacityError when the system does not let this process have so many.
    """
    spin_us = env.get_int("MXN_SPIN_US")
    try:
        return library().Pool(num_threads, spin_us, env.get("MXN_PIN") == "on")
    except RuntimeError as error:
        raise CapacityError(
            f"{num_threads} threads for the native kernels could not be started: {error}",
            hint="set fewer threads (MXN_THREADS), or raise the limit of processes or memory",
        ) from error
