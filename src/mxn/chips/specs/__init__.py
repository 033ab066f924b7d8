"""What is known about chips, one TOML file each, every figure with its basis. Start at `load`.

Unknown stays absent. A measured figure stands beside the peak and never replaces it. The files are
written by `tools/import_chip_specs.py` and by hand.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mxn.errors import InternalError, NotFoundError

BASES = ("datasheet", "derived", "measured", "assumed", "simulated")
_LIMITS = ("datasheet", "derived", "assumed")  # for an upper bound, the most trusted first
_KEYS = {
    "tflop_per_s": "TFLOP/s",
    "tera_op_per_s": "TOP/s",
    "bytes": "B",
    "gb_per_s": "GB/s",
    "allreduce_gb_per_s": "GB/s",
    "watts": "W",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One number about a chip. GB are decimal, peaks are dense."""

    # dtype of a peak ("fp16", "int8", …), "memory", "memory rate", "link", "all-reduce", "power"
    what: str
    value: float
    unit: str
    basis: str
    source: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Spec:
    """A kind of chip."""

    name: str
    title: str
    vendor: str
    torch_device: str
    match: tuple[str, ...]  # regular expressions for the driver's name of the device
    figures: tuple[Figure, ...]
    memory_gb: tuple[float, ...] = ()  # tells apart versions that share a name; empty: any

    def all(self, what: str) -> list[Figure]:
        return [figure for figure in self.figures if figure.what == what]

    def best(self, what: str) -> Figure | None:
        """Return the upper bound with the most trusted basis, or None; never a measurement."""
        found = [figure for figure in self.all(what) if figure.basis in _LIMITS]
        return min(found, key=lambda figure: _LIMITS.index(figure.basis), default=None)


@cache
def all_specs() -> dict[str, Spec]:
    """Return every known chip by name."""
    folder = Path(__file__).parent
    specs = [parse(path.read_text(), path.name) for path in sorted(folder.glob("*.toml"))]
    return {spec.name: spec for spec in specs}


def find(name: str) -> Spec | None:
    """Return what is known about a chip, or None: many chips, such as CPUs, have no data sheet."""
    return all_specs().get(name)


def load(name: str) -> Spec:
    """Return what is known about a chip. Raises: NotFoundError."""
    spec = find(name)
    if spec is None:
        raise NotFoundError(
            f"nothing is known about chip {name!r}", hint="`mxn chips specs` lists all known chips"
        )
    return spec


def match(vendor: str, device_name: str, memory_bytes: int | None = None) -> Spec | None:
    """Return the spec whose pattern fits the longest part of a driver's device name, or None."""
    fits = [
        (len(found[0]), spec)
        for spec in all_specs().values()
        if spec.vendor == vendor and _has_memory(spec, memory_bytes)
        for pattern in spec.match
        if (found := re.search(pattern, device_name, re.IGNORECASE))
    ]
    return max(fits, key=lambda fit: fit[0])[1] if fits else None


def parse(text: str, where: str) -> Spec:
    """Read one TOML file. Raises: InternalError naming `where` when it breaks the format."""
    data = tomllib.loads(text)
    try:
        figures = [
            _figure(kind, entry)
            for kind in ("peak", "memory", "link", "power")
            for entry in data.get(kind, [])
        ]
        return Spec(
            data["name"], data["title"], data["vendor"], data["torch_device"],
            tuple(data.get("match", ())), tuple(figures), tuple(data.get("memory_gb", ())),
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        raise InternalError(f"chip spec {where}: {error}") from error


def _figure(kind: str, entry: dict[str, Any]) -> Figure:
    key = next((key for key in _KEYS if key in entry), None)
    if key is None:
        raise ValueError(f"[[{kind}]] has none of {', '.join(_KEYS)}")
    if entry["basis"] not in BASES:
        raise ValueError(f"basis {entry['basis']!r} is none of {', '.join(BASES)}")
    names = {
        ("memory", "bytes"): "memory",
        ("memory", "gb_per_s"): "memory rate",
        ("link", "gb_per_s"): "link",
        ("link", "allreduce_gb_per_s"): "all-reduce",
        ("power", "watts"): "power",
    }
    what = entry["dtype"] if kind == "peak" else names[kind, key]
    return Figure(
        what, float(entry[key]), _KEYS[key], entry["basis"],
        entry.get("source", ""), entry.get("note", ""),
    )  # fmt: skip


def _has_memory(spec: Spec, memory_bytes: int | None) -> bool:
    """Compare loosely: a driver reports GiB or GB, and keeps some for itself."""
    if memory_bytes is None or not spec.memory_gb:
        return True
    return any(0.85 < memory_bytes / (gb * 1e9) < 1.15 for gb in spec.memory_gb)
