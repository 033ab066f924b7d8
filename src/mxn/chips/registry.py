"""Finds the vendor plug-ins: entry points of the group `mxn.chips`, ours and other people's alike.

A plug-in that cannot be imported is kept with its error, for `mxn chips --explain`, and stops
nobody.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from mxn.chips.chip import Chip
from mxn.errors import InternalError, NotFoundError

log = logging.getLogger("mxn.chips")

GROUP = "mxn.chips"


@dataclass(frozen=True, slots=True)
class Plugin:
    """An entry point: either a chip or the reason why there is none."""

    name: str
    value: str  # "module:Class"
    chip: Chip | None
    error: str | None = None


@cache
def plugins() -> tuple[Plugin, ...]:
    """Return all plug-ins of this installation, by name. Loaded once per process."""
    return load_plugins(importlib.metadata.entry_points(group=GROUP))


def load_plugins(points: Iterable[importlib.metadata.EntryPoint]) -> tuple[Plugin, ...]:
    """Load entry points; the same one twice counts once, two under one name are both refused."""
    by_name: dict[str, dict[str, importlib.metadata.EntryPoint]] = {}
    for point in points:
        by_name.setdefault(point.name, {})[point.value] = point
    return tuple(_load(name, list(by_name[name].values())) for name in sorted(by_name))


def chip_of(vendor: str) -> Chip:
    """Return the plug-in of a vendor. Raises: NotFoundError."""
    for plugin in plugins():
        if plugin.chip is not None and plugin.chip.vendor == vendor:
            return plugin.chip
    known = ", ".join(p.chip.vendor for p in plugins() if p.chip)
    raise NotFoundError(f"no chip plug-in for vendor {vendor!r}; there are: {known}")


def _load(name: str, points: list[importlib.metadata.EntryPoint]) -> Plugin:
    values = " and ".join(point.value for point in points)
    if len(points) > 1:
        return Plugin(name, values, None, f"two plug-ins are named {name!r}: {values}")
    try:
        found = points[0].load()
        chip = found()
        if not isinstance(chip, Chip):
            raise InternalError(f"{values} is not a mxn.chips.chip.Chip")
    except Exception as error:  # whatever is wrong with one plug-in is that plug-in's affair
        message = f"{type(error).__name__}: {error}"
        log.warning("chip plug-in %r (%s) is broken: %s", name, values, message)
        return Plugin(name, values, None, message)
    return Plugin(name, values, chip)
