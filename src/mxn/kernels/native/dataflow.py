"""Which way of multiplying is fastest for a shape here: measured, stored, read at load.

A product of M rows can read its rows where they lie ("flat") or copy them first into one stream for
each tile ("tiled"), which costs a little and lets the processor fetch ahead. Source of the idea:
the heuristic dataflow of FlashDecoding++, arXiv 2311.01282, section 5. Start at `tiled_from`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from mxn import env
from mxn.kernels.native.library import library, pool
from mxn.kernels.tune import Busy, Table, Times, busy_reason

if TYPE_CHECKING:
    from mxn.kernels.native.pack import PackedWeight

NEVER = 1 << 62
ROWS = (16, 64, 256)
_DEFAULT = NEVER  # where nothing was measured
_BUDGET_S = 0.04  # for each way and number of rows
_MARGIN = 1.01


def key_of(weight: PackedWeight, num_threads: int) -> str:
    shape = f"{weight.in_features}x{weight.out_features}"
    lib = library()
    return f"native {lib.revision} {lib.variant()} {weight.format} {shape} t{num_threads}"


def tiled_from(weight: PackedWeight, table: Table, num_threads: int) -> tuple[int, str]:
    """Return from how many rows on tiling pays, and how that is known.

    Measures on first sight unless MXN_KERNEL_TUNING is off or the machine is busy.
    """
    if not weight.format.is_quantized:
        return NEVER, "plain weights read rows where they lie"
    key = key_of(weight, num_threads)
    times = table.known(key, {"flat", "tiled"})
    if times is not None:
        return threshold(times), "measured before"
    if env.get("MXN_KERNEL_TUNING") == "off":
        return _DEFAULT, "default (MXN_KERNEL_TUNING=off)"
    if reason := busy_reason():
        return _DEFAULT, f"default: not measured, machine busy ({reason})"
    try:
        times = measure(weight, num_threads)
    except Busy as busy:
        return _DEFAULT, f"default: not measured, machine busy ({busy})"
    table.store(key, times)
    return threshold(times), "measured here"


def threshold(times: Times) -> int:
    """Return the least number of rows from which on "tiled" was faster in every case."""
    best = NEVER
    for rows in sorted((int(case.removeprefix("M=")) for case in times["flat"]), reverse=True):
        case = f"M={rows}"
        if times["tiled"][case] * _MARGIN >= times["flat"][case]:
            break
        best = rows
    return best


def measure(weight: PackedWeight, num_threads: int) -> Times:
    """Return microseconds of both ways for some numbers of rows. Raises: Busy."""
    lib, threads = library(), pool(num_threads)
    times: Times = {"flat": {}, "tiled": {}}
    before = weight.handle.tiled_from
    ways = {"flat": NEVER, "tiled": 1}
    for rows in ROWS:
        x = torch.sin(torch.arange(rows * weight.in_features, dtype=torch.float32))
        y = torch.empty(rows, weight.out_features)
        best = dict.fromkeys(ways, float("inf"))
        samples: list[float] = []
        deadline = time.perf_counter() + 2 * _BUDGET_S
        while len(samples) < 3 or time.perf_counter() < deadline:
            for way, limit in ways.items():
                weight.handle.tiled_from = limit
                start = time.perf_counter()
                lib.linear(
                    threads, weight.handle, x.data_ptr(), weight.in_features, rows,
                    y.data_ptr(), weight.out_features, 0,
                )  # fmt: skip
                took = time.perf_counter() - start
                best[way] = min(best[way], took)
                samples.append(took)
        samples.sort()
        if samples[len(samples) // 2] > 2 * samples[0]:
            weight.handle.tiled_from = before
            raise Busy(f"times vary from {samples[0] * 1e6:.0f} to {samples[-1] * 1e6:.0f} us")
        for way, seconds in best.items():
            times[way][f"M={rows}"] = seconds * 1e6
    weight.handle.tiled_from = before
    return times
