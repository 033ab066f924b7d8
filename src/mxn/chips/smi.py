"""Reading what the vendors' management tools print: tables, CSV and JSON. Knows no vendor.

The tables of most tools go back to one ancestor: a device takes two or three lines, the first
starts with its number and name, memory and load stand somewhere in them. `table` reads all of
those, given two small patterns.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

MIB = 2**20
_HEAD = re.compile(r"^\s*\|?\s*(\d+)\s+([^|]*[A-Za-z][^|]*?)\s*\|")
_NAME_TAIL = re.compile(r"\s+(N/A|On|Off|v[\d.]+)$")
_NAME_HEAD = re.compile(r"^/\s+")  # cnmon: virtual function, "/" when there is none
_UNIT_BYTES = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, slots=True)
class Row:
    """One device as a management tool lists it. None: the tool does not say."""

    index: int  # position in the list; not every tool numbers devices uniquely
    name: str
    memory_bytes: int | None = None
    used_bytes: int | None = None
    busy: float | None = None  # 0 to 1


def table(text: str, memory: str, busy: str | None = None) -> list[Row]:
    """Read a table whose rows start with a number and a name.

    `memory` finds the groups "total" and, where printed, "used" in MiB; `busy` the group "busy" in
    percent. Both are searched in the whole row, lines joined by " | ".
    """
    rows: list[Row] = []
    lines = text.partition("Process")[0].splitlines()
    at = 0
    while at < len(lines):
        head = _HEAD.match(lines[at])
        if not head:
            at += 1
            continue
        whole = " | ".join(lines[at : at + 2])
        rows.append(_row(len(rows), head[2], whole, memory, busy))
        at += 2  # the second line may start with a number too
    return rows


def _row(index: int, name: str, whole: str, memory: str, busy: str | None) -> Row:
    found = re.search(memory, whole)
    load = re.search(busy, whole) if busy else None
    groups = found.groupdict() if found else {}
    name = _NAME_TAIL.sub("", _NAME_HEAD.sub("", name)).strip()
    return Row(
        index,
        name,
        _mib(groups.get("total")),
        _mib(groups.get("used")),
        float(load["busy"]) / 100 if load else None,
    )


def csv(text: str) -> list[Row]:
    """Read lines of "index, name, total memory, used memory, load" in MiB and percent, no header.

    A field that the tool does not know ("[N/A]", "[Not Supported]") is None.
    """
    rows = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) < 3 or not fields[0].isdigit():
            continue
        numbers = [_leading_number(field) for field in fields[2:5]] + [None] * 3
        total, used, busy = numbers[:3]
        rows.append(
            Row(int(fields[0]), fields[1],
                None if total is None else int(total) * MIB,
                None if used is None else int(used) * MIB,
                None if busy is None else busy / 100)
        )  # fmt: skip
    return rows


def rocm_json(text: str) -> list[Row]:
    """Read `rocm-smi --showproductname --showmeminfo vram --showuse --json` and its descendants.

    Keys differ in case and wording between versions, so they are searched, not named.
    """
    rows: list[Row] = []
    for card, fields in _object(text).items():
        if not re.fullmatch(r"card\d+", card) or not isinstance(fields, dict):
            continue
        low = {key.lower(): str(value) for key, value in fields.items()}
        name = _first(low, "card series") or _first(low, "device name") or _first(low, "card model")
        busy = _first(low, " use (%)")
        rows.append(
            Row(
                int(card[4:]),
                name or card,
                _sized(low, "total memory"),
                _sized(low, "used memory"),
                float(busy) / 100 if busy and busy.replace(".", "").isdigit() else None,
            )
        )
    return sorted(rows, key=lambda row: row.index)


def intel_json(text: str) -> list[Row]:
    """Read `xpu-smi discovery -j` of Intel's tool."""
    listed = _object(text).get("device_list")
    return [
        Row(
            int(entry.get("device_id", index)),
            str(entry.get("device_name", "Intel GPU")),
            _int(entry.get("memory_physical_size_byte")),
        )
        for index, entry in enumerate(listed if isinstance(listed, list) else [])
        if isinstance(entry, dict) and entry.get("device_type", "GPU") == "GPU"
    ]


def _object(text: str) -> dict[str, Any]:
    """Return the JSON object in `text`, or an empty one: a tool may print a warning instead."""
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _first(fields: dict[str, str], part: str) -> str | None:
    return next((value for key, value in fields.items() if part in key), None)


def _sized(fields: dict[str, str], part: str) -> int | None:
    """Return bytes from a key like "VRAM Total Memory (B)", whose unit stands in the key.

    "Total Used Memory" is used memory: the words must follow each other.
    """
    for key, value in fields.items():
        unit = re.search(r"\((\w+)\)$", key)
        if part in key and unit and unit[1] in _UNIT_BYTES and value.isdigit():
            return int(value) * _UNIT_BYTES[unit[1]]
    return None


def _leading_number(field: str) -> float | None:
    found = re.match(r"\d+(\.\d+)?", field)
    return float(found[0]) if found else None


def _mib(digits: str | None) -> int | None:
    return None if digits is None else int(digits) * MIB


def _int(value: Any) -> int | None:
    return int(value) if str(value).isdigit() else None
