"""Parse and print quantities in one place. Bytes are binary (GiB) unless the name says so."""

from __future__ import annotations

import re

_BYTE_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
}  # fmt: skip


def parse_bytes(text: str | int) -> int:
    """Return the bytes meant by `text`, such as ``"16GiB"``, ``"500 MB"`` or ``4096``.

    Raises: ValueError for an unknown unit or no number.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _BYTE_UNITS:
        raise ValueError(f"cannot read {text!r} as a size; examples: 16GiB, 500MB, 4096")
    return int(float(match[1]) * _BYTE_UNITS[match[2].upper()])


def format_bytes(num_bytes: float) -> str:
    """Return `num_bytes` with a binary unit and three significant digits, such as ``15.2 GiB``."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def format_rate(per_s: float, unit: str) -> str:
    """Return a rate with an SI prefix, such as ``13.7 GB/s`` or ``0.8 TOPS``."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(per_s) >= scale:
            return f"{per_s / scale:.3g} {prefix}{unit}"
    return f"{per_s:.3g} {unit}"


def format_seconds(seconds: float) -> str:
    """Return a duration in the unit a person would choose: ``850 us``, ``12.3 ms``, ``4.2 s``."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min"
