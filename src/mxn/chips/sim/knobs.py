"""Turn the simulated chip slow, flaky or small while it runs, and read what it counted.

    with knobs.override(launch_us=50, memory_bytes=2**20):
        ...
    knobs.fail_after(3)          # the third operator from now on fails
    knobs.operators()["aten::mm"]

All knobs are of the process and, where nothing else is said, of all its devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from mxn.chips.sim.device import load
from mxn.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """How the chip behaves now."""

    launch_us: float  # added to each operator and copy
    slow_factor: (
        float  # each operator takes this many times what it takes on the CPU; 1 = no change
    )
    link_bytes_per_s: float  # speed of copies from, to and between devices; 0 = as fast as memory
    memory_bytes: int  # of each device
    poison: bool  # new memory is filled with NaN (integers: -1) instead of what lay there


@dataclass(frozen=True, slots=True)
class CopyCount:
    count: int
    num_bytes: int


def current() -> Knobs:
    """Return the knobs as they stand."""
    extension = load()
    return Knobs(
        launch_us=extension.launch_us(),
        slow_factor=extension.slow_factor(),
        link_bytes_per_s=extension.link_bytes_per_s(),
        memory_bytes=extension.memory_bytes(0),
        poison=extension.poison(),
    )


def set(**changes: Any) -> None:
    """Change the knobs named, which are the fields of `Knobs`.

    Raises: ConfigError for an unknown knob or an impossible value.
    """
    unknown = sorted(changes.keys() - asdict(current()).keys())
    if unknown:
        choices = ", ".join(asdict(current()))
        raise ConfigError(f"unknown knobs {unknown} of the simulated chip; there are {choices}")
    _apply(_checked(replace(current(), **changes)))


@contextmanager
def override(**changes: Any) -> Iterator[None]:
    """Change knobs for the length of a `with` block."""
    before = current()
    set(**changes)
    try:
        yield
    finally:
        _apply(before)


def fail_after(n: int, *, forever: bool = False) -> None:
    """Make the n-th operator or copy from now on raise `torch.AcceleratorError`, a RuntimeError.

    With `forever` all later ones fail too, like a chip that has fallen off the bus. n = 0 disarms
    and heals. Raises: ConfigError for a negative n.
    """
    if n < 0:
        raise ConfigError(f"fail_after counts operators from 1, got {n}", hint="0 disarms it")
    load().set_fail_after(n, forever)


def operators() -> dict[str, int]:
    """Return how often each operator ran since `reset_counters`, such as ``{"aten::mm": 3}``.

    Views and empty tensors launch nothing and are not counted.
    """
    return load().operator_counts()


def copies() -> dict[str, CopyCount]:
    """Return copies and their bytes: `h2d`, `d2h`, `d2d` (between devices) and `on_device`."""
    counts = load().copy_counts()
    return {kind: CopyCount(count, num_bytes) for kind, (count, num_bytes) in counts.items()}


def bytes_now(device: int = 0) -> int:
    """Return the bytes allocated on a device."""
    return load().bytes_now(device)


def bytes_peak(device: int = 0) -> int:
    """Return the most bytes that were allocated on a device since `reset_counters`."""
    return load().bytes_peak(device)


def reset_counters() -> None:
    """Forget operators and copies, and let the peak start from what is allocated now."""
    extension = load()
    extension.reset_operator_counts()
    extension.reset_copy_counts()
    for device in range(extension.num_devices()):
        extension.reset_peak(device)


def reset() -> None:
    """Heal the chip and make it fast again; memory keeps its size. Counters are reset too."""
    fail_after(0)
    set(launch_us=0, slow_factor=1, link_bytes_per_s=0, poison=False)
    reset_counters()


def _checked(knobs: Knobs) -> Knobs:
    if knobs.slow_factor < 1:
        raise ConfigError(f"slow_factor must be at least 1, got {knobs.slow_factor}")
    for name in ("launch_us", "link_bytes_per_s", "memory_bytes"):
        if getattr(knobs, name) < 0:
            raise ConfigError(f"{name} must be at least 0, got {getattr(knobs, name)}")
    return knobs


def _apply(knobs: Knobs) -> None:
    extension = load()
    extension.set_launch_us(knobs.launch_us)
    extension.set_slow_factor(knobs.slow_factor)
    extension.set_link_bytes_per_s(knobs.link_bytes_per_s)
    extension.set_poison(knobs.poison)
    for device in range(extension.num_devices()):
        extension.set_memory_bytes(device, knobs.memory_bytes)
