"""Measured times of kernels on this chip, kept so that later loads do not measure again.

Start at `linear_times`. The table is one JSON file for each chip and torch version, under
``MXN_HOME/kernels``; it also says which kernels failed their parity test and are off.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxn import env

if TYPE_CHECKING:
    import torch

    from mxn.kernels.registry import Kernel, Linear

LINEAR_ROWS = (1, 16, 256)
Times = dict[str, dict[str, float]]  # kernel -> case -> least microseconds

_COLD_BYTES = 96 << 20  # weights are cycled through so many bytes, so that no cache holds them
_MAX_OUT_FEATURES = 16384  # beyond, time grows in proportion; a slice is measured
_CASE_BUDGET_S = 0.25
_MARGIN = math.log(1.05)
_QUIET = 2.0  # medians over this many times the best sample mean a busy machine
_BUSY_LOAD = 1.5  # runnable threads for each core


@dataclass
class Table:
    """The stored measurements of one chip."""

    path: Path
    chip: str
    times: dict[str, dict[str, Any]] = field(default_factory=dict)
    off: dict[str, str] = field(default_factory=dict)  # "op/kernel dtype" -> reason
    passed: set[str] = field(default_factory=set)  # "op/kernel dtype" that passed its parity test

    @classmethod
    def open(cls, chip: str) -> Table:
        """Read the table of `chip`, or start an empty one; a broken file is measured anew."""
        import torch

        table = cls(env.home() / "kernels" / f"{chip}-{torch.__version__}.json", chip)
        table._read()
        return table

    def _read(self) -> None:
        if not self.path.exists():
            self.times, self.off, self.passed = {}, {}, set()
            return
        try:
            stored = json.loads(self.path.read_text())
            self.times, self.off = stored["times"], stored["off"]
            self.passed = set(stored.get("passed", ()))
        except (json.JSONDecodeError, KeyError, TypeError):
            self.times, self.off, self.passed = {}, {}, set()

    def off_reason(self, op: str, kernel: str, dtype: str, needs_proof: bool = False) -> str | None:
        """Return why parity forbids this kernel: it failed, or has not passed and needs to."""
        key = f"{op}/{kernel} {dtype}"
        if needs_proof and key not in self.passed | self.off.keys():
            return f"not verified on this chip yet: run mxn kernels verify --dtype {dtype}"
        return self.off.get(key)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change what is stored now, not what was read at `open`.

        Two processes load at the same time: neither may undo what the other measured, and least of
        all what it turned off. Whoever only reads sees a whole file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read()
            yield
            stored = {"chip": self.chip, "times": self.times, "off": self.off}
            text = json.dumps(stored | {"passed": sorted(self.passed)}, indent=1)
            scratch = self.path.with_suffix(f".{os.getpid()}.tmp")
            scratch.write_text(text)
            scratch.replace(self.path)

    def forget(self) -> None:
        """Drop all measured times; what parity turned off stays off."""
        with self._changing():
            self.times.clear()

    def judge(self, verdicts: dict[str, str | None]) -> None:
        """Turn kernels ("op/kernel dtype") off with a reason, or on again with None."""
        with self._changing():
            for key, reason in verdicts.items():
                self.off.pop(key, None)
                self.passed.discard(key)
                if reason is None:
                    self.passed.add(key)
                else:
                    self.off[key] = reason

    def known(self, key: str, names: set[str]) -> Times | None:
        """Return stored times of `key` if they cover exactly the kernels `names`."""
        entry = self.times.get(key)
        return entry["us"] if entry and set(entry["us"]) == names else None

    def store(self, key: str, times: Times, *, instead_of: str | None = None) -> None:
        """Keep the times of `key` for all later loads; forget keys that begin with `instead_of`."""
        entry = {
            "us": times,
            "basis": "measured",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with self._changing():
            for other in [k for k in self.times if instead_of and k.startswith(instead_of)]:
                del self.times[other]
            self.times[key] = entry


class Busy(Exception):
    """The machine has other work: times would say nothing of the kernels. Priority decides."""


def busy_reason() -> str | None:
    """Return why this is no moment to measure, or None."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f"load {load:.1f} on {cores} cores" if load > _BUSY_LOAD * cores else None


def fastest(times: Times, by_priority: list[str]) -> str:
    """Return the kernel with the smallest geometric mean over its cases.

    A kernel must beat those of higher priority by 5 %, so that noise does not change the choice.
    """

    def score(name: str) -> float:
        return sum(math.log(us) for us in times[name].values()) / len(times[name])

    best = by_priority[0]
    for name in by_priority[1:]:
        if score(name) < score(best) - _MARGIN:
            best = name
    return best


def linear_times(
    table: Table,
    kernels: list[Kernel],
    in_features: int,
    out_features: int,
    dtype: str,
    device: torch.device,
) -> Times:
    """Return the microseconds of each kernel for a weight of this shape, measured or stored.

    Raises: Busy when the machine is too busy to measure.
    """
    import torch

    key = f"linear {in_features}x{out_features} {dtype} {device.type} t{torch.get_num_threads()}"
    stored = table.known(key, {kernel.name for kernel in kernels})
    if stored:
        return stored
    if busy := busy_reason():
        raise Busy(busy)
    rows = min(out_features, _MAX_OUT_FEATURES)
    torch_dtype = getattr(torch, dtype)
    packed = {
        k.name: [
            k.prepare(table, weight)[0]
            for weight in cold_copies(rows, in_features, torch_dtype, device)
        ]
        for k in kernels
    }
    times: Times = {kernel.name: {} for kernel in kernels}
    with torch.inference_mode():
        for num_rows in LINEAR_ROWS:
            x = pattern(num_rows, in_features, torch_dtype, device)
            runs = {name: cycle(weights, x) for name, weights in packed.items()}
            for name, us in interleaved_best(runs, device).items():
                times[name][f"M={num_rows}"] = us * out_features / rows
    table.store(key, times)
    return times


def op_times(
    table: Table, op: str, kernels: list[Kernel], device: torch.device, dtype: torch.dtype
) -> Times:
    """Return the microseconds of each kernel on the typical cases, measured or stored.

    Raises: Busy when the machine is too busy to measure.
    """
    import torch

    from mxn.kernels.parity import typical_cases

    key = f"{op} {str(dtype).removeprefix('torch.')} {device.type} t{torch.get_num_threads()}"
    stored = table.known(key, {kernel.name for kernel in kernels})
    if stored:
        return stored
    if busy := busy_reason():
        raise Busy(busy)
    times: Times = {kernel.name: {} for kernel in kernels}
    with torch.inference_mode():
        for case in typical_cases(op):
            args = case.arguments(device, dtype)
            runs = {k.name: _call(k.fn, args) for k in kernels}
            for name, us in interleaved_best(runs, device).items():
                times[name][str(case)] = us
    table.store(key, times)
    return times


def interleaved_best(
    runs: dict[str, Callable[[], object]], device: torch.device, budget_s: float | None = None
) -> dict[str, float]:
    """Return the least microseconds of each run.

    The runs take turns, so that a neighbour's load or a clock change hits all of them alike. The
    least, not the median: what is over it measures who else wanted the cores.
    Raises: Busy when that was most of the time.
    """
    for run in runs.values():  # warm-up: first calls allocate and compile
        run()
    synchronize(device)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    budget_s = _CASE_BUDGET_S if budget_s is None else budget_s
    deadline = time.perf_counter() + budget_s * len(runs)
    rounds = 0
    while rounds < 3 or (rounds < 100 and time.perf_counter() < deadline):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            synchronize(device)
            samples[name].append((time.perf_counter() - start) * 1e6)
        rounds += 1
    for part in samples.values():
        if statistics.median(part) > _QUIET * min(part):
            raise Busy(f"times vary from {min(part):.0f} to {max(part):.0f} us")
    return {name: min(part) for name, part in samples.items()}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it; the CPU always has."""
    import torch

    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def cold_copies(
    rows: int, cols: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Return one weight so many times that no cache holds all of them."""
    weight = pattern(rows, cols, dtype, device)
    copies = max(1, min(16, math.ceil(_COLD_BYTES / max(1, weight.nbytes))))
    return [weight.clone() for _ in range(copies)]


def cycle(weights: list[Linear], x: torch.Tensor) -> Callable[[], object]:
    """Return a call that multiplies `x` by the next of `weights`."""
    position = 0

    def run() -> object:
        nonlocal position
        position = (position + 1) % len(weights)
        return weights[position](x)

    return run


def _call(fn: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], object]:
    return lambda: fn(*args)


def pattern(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return values of ordinary size; cheap, because zeros or denormals would distort the times."""
    import torch

    tile = torch.sin(torch.arange(4096, dtype=torch.float32)).mul_(0.05)
    flat = tile.repeat(math.ceil(rows * cols / len(tile)))[: rows * cols]
    return flat.reshape(rows, cols).to(device=device, dtype=dtype)
