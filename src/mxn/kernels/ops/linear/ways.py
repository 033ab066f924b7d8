"""Up to how many rows each way of a Triton product is the fastest here: measured, stored, read.

A product of M rows can go without tensor cores (`gemv`), flat (`flat`), or the library's way
(`torch`). Source: the heuristic dataflow of FlashDecoding++, arXiv 2311.01282, section 5. Knows
times and the table of a chip; launches nothing. Start at `known`; `mxn tune` calls `measure`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mxn.kernels import tune

if TYPE_CHECKING:
    import torch

    from mxn.kernels.tune import Table, Times

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GEMV_ROWS = (1, 2, 4)  # it reads the weight once for each row
_MARGIN = 0.98  # what a way must take of the next one's time, so that noise does not choose
_ALL = 1 << 62


@dataclass(frozen=True, slots=True)
class Bounds:
    """Up to `gemv_rows` rows go without tensor cores, up to `flat_rows` flat, more to torch."""

    gemv_rows: int
    flat_rows: int

    def __str__(self) -> str:
        return f"gemv to {self.gemv_rows}, flat to {self.flat_rows} rows"


ESTIMATE = Bounds(gemv_rows=1, flat_rows=64)  # where nothing was measured
ONLY = {"gemv": Bounds(_ALL, _ALL), "flat": Bounds(0, _ALL), "torch": Bounds(0, 0)}


def key_of(in_features: int, out_features: int, dtype: str, device_type: str) -> str:
    return f"linear ways {in_features}x{out_features} {dtype} {device_type}"


def known(
    table: Table, in_features: int, out_features: int, dtype: str, device_type: str
) -> Bounds | None:
    """Return the bounds of a shape that `mxn tune` measured on this chip, or None."""
    times = table.known(key_of(in_features, out_features, dtype, device_type), set(ONLY))
    return None if times is None else bounds_of(times)


def bounds_of(times: Times) -> Bounds:
    """Return the largest numbers of rows up to which a way won in every case.

    `times`: microseconds by way and case ("M=8"); a way that lacks a case was not tried there.
    """
    gemv = flat = 0
    for rows in sorted(int(case.removeprefix("M=")) for case in times["torch"]):
        case = f"M={rows}"
        library, single = times["torch"][case], times["gemv"].get(case)
        others = min(times["flat"][case], library)
        if gemv == flat and single is not None and single < _MARGIN * others:
            gemv = flat = rows
        elif times["flat"][case] < _MARGIN * library:
            flat = rows
        else:
            break
    return Bounds(gemv, flat)


def measure(
    table: Table,
    prepare: Callable[[torch.Tensor, Bounds], Any],
    in_features: int,
    out_features: int,
    dtype: str,
    device: torch.device,
) -> Bounds:
    """Time the three ways for a weight of this shape, store the times and return the bounds.

    `prepare` makes a linear of a weight [F, D] with given bounds. Times of this shape against
    other kernels are forgotten: they were taken with other bounds.
    Raises: Busy when the machine is too busy to measure.
    """
    import torch

    if busy := tune.busy_reason():
        raise tune.Busy(busy)
    torch_dtype = getattr(torch, dtype)
    weights = tune.cold_copies(out_features, in_features, torch_dtype, device)
    linears = {way: [prepare(w, only) for w in weights] for way, only in ONLY.items()}
    times: Times = {way: {} for way in ONLY}
    with torch.inference_mode():
        for num_rows in ROWS:
            x = tune.pattern(num_rows, in_features, torch_dtype, device)
            ways = [way for way in ONLY if way != "gemv" or num_rows in GEMV_ROWS]
            runs = {way: tune.cycle(linears[way], x) for way in ways}
            for way, us in tune.interleaved_best(runs, device).items():
                times[way][f"M={num_rows}"] = us
    table.store(
        key_of(in_features, out_features, dtype, device.type), times,
        instead_of=f"linear {in_features}x{out_features} {dtype} {device.type} ",
    )  # fmt: skip
    return bounds_of(times)
