"""After a failure: does the device still compute, and did it only run out of memory?

Knows no requests and no models. Start at `check_device`.
"""

from __future__ import annotations

import logging

import torch

from mxn.errors import ChipError

log = logging.getLogger("mxn.engine")


def check_device(device: torch.device, error: Exception) -> None:
    """Note a failure and make sure that the device still computes.

    Raises: ChipError when it does not: the process then ends, and a new one begins afresh.
    """
    log.error("forward pass failed: %s: %s", type(error).__name__, first_line(error))
    log.debug("where it failed", exc_info=error)
    if isinstance(error, ChipError):
        raise error
    empty_cache = getattr(torch.get_device_module(device), "empty_cache", None)
    try:
        if empty_cache and is_out_of_memory(error):
            empty_cache()
        is_alive = (torch.ones(2, device=device) + 1).sum().item() == 4
    except Exception as second:
        raise ChipError(
            f"{device} stopped working after: {first_line(error)}", device=str(device)
        ) from second
    if not is_alive:
        raise ChipError(f"{device} computes 1 + 1 wrongly", device=str(device)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a chip said that memory ran out; makers raise different classes for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return (str(error).splitlines() or [""])[0]
