"""N: chips. What this machine has, told by vendor plug-ins; what chips can do; what was measured.

Start at `discovery.survey`; a plug-in is `chip.Chip`. Names cost nothing here: torch is imported
only when a device that needs it is really there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mxn.chips.chip import Chip, Device, UnusableError
    from mxn.chips.discovery import (
        Survey,
        default_dtype,
        detect,
        find_device,
        free_memory,
        survey,
        utilization,
    )
    from mxn.chips.probe import Probe

_HOME = {
    "Chip": "chip",
    "Device": "chip",
    "UnusableError": "chip",
    "Probe": "probe",
    "Survey": "discovery",
    "default_dtype": "discovery",
    "detect": "discovery",
    "find_device": "discovery",
    "free_memory": "discovery",
    "survey": "discovery",
    "utilization": "discovery",
}

__all__ = [
    "Chip",
    "Device",
    "Probe",
    "Survey",
    "UnusableError",
    "default_dtype",
    "detect",
    "find_device",
    "free_memory",
    "survey",
    "utilization",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
