"""A public trace of requests as a timetable: when, how long a prompt, how long an answer.

Reads the Azure LLM inference trace 2023 (CSV: TIMESTAMP, ContextTokens, GeneratedTokens; CC BY 4.0,
github.com/Azure/AzurePublicDataset, published with Splitwise, ISCA 2024). Knows no servers.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Arrival:
    """`at_s`: seconds of trace time after the first one."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path, scale: float, longest: int) -> list[Arrival]:
    """Return all rows; lengths are multiplied by `scale` and lie between 1 and `longest`.

    Raises: SystemExit for a file that is no such trace.
    """

    def length(text: str) -> int:
        return min(longest, max(1, round(int(text) * scale)))

    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= rows[0].keys():
        raise SystemExit(f"{path} has not the columns of the Azure LLM inference trace 2023")
    # Seven digits of a second are one more than Python reads.
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    return [
        Arrival(at - times[0], length(row["ContextTokens"]), length(row["GeneratedTokens"]))
        for at, row in zip(times, rows, strict=True)
    ]


def timetable(trace: list[Arrival], requests: int | None, hours: float | None) -> Iterator[Arrival]:
    """Yield the trace, again and again, for so many requests or hours of its own time."""
    length_s = trace[-1].at_s + 1.0
    number = 0
    while True:
        turn, place = divmod(number, len(trace))
        found = trace[place]
        at_s = turn * length_s + found.at_s
        if (requests is not None and number >= requests) or (hours and at_s > hours * 3600):
            return
        yield Arrival(at_s, found.prompt_tokens, found.output_tokens)
        number += 1
