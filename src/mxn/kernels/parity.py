"""Compares every kernel with `naive.py`, on any device. New kernels and vendors' plug-ins need
only register: their op's cases are already there.

Each op folder has `cases.py` with `CASES`. Inputs come from a seeded float64 master, rounded once
to the dtype under test, so all dtypes and devices see the same numbers; the truth is computed on
the CPU. Start at `check`; `verify` runs all kernels of a chip and turns those off that fail.
"""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mxn.kernels import registry
from mxn.kernels.registry import Kernel
from mxn.kernels.tune import Table, synchronize

# RMS of the error over RMS of the truth. A rounding to the dtype costs half a unit in the last
# place; sums of products in another order cost a few of float32's.
TOLERANCES = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 6e-3}
# How many tolerances one element may be off, of its own size or of the RMS of its row. Correct
# kernels stay below 1.6 on x86; an element of usual size that is left out is off by 160 or more.
OUTLIER = 8.0

Outputs = dict[str, Tensor]


class Maker:
    """Makes the inputs of a case on the CPU: same seed, same numbers, whatever the dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._random = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal numbers, in the dtype under test unless `dtype` says otherwise."""
        master = torch.randn(shape, generator=self._random, dtype=torch.float64)
        return (master * scale).to(dtype or self.dtype)

    def normal32(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.normal(*shape, scale=scale, dtype=torch.float32)

    def uniform32(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._random, dtype=torch.float64).float()

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._random)

    def permutation(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self._random)


def _call(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return fn(*args)


def _name_outputs(_args: tuple[Any, ...], result: Any) -> Outputs:
    if isinstance(result, Tensor):
        return {"out": result}
    return {f"out[{i}]": part for i, part in enumerate(result)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of inputs of an op. `build` makes the arguments; other hooks are rarely needed."""

    name: str
    build: Callable[[Maker], tuple[Any, ...]]
    call: Callable[[Callable[..., Any], tuple[Any, ...]], Any] = _call
    outputs: Callable[[tuple[Any, ...], Any], Outputs] = _name_outputs
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    is_typical: bool = False  # also used to measure speed
    slack: float = 1.0  # factor on the tolerance, with its reason beside it

    def __str__(self) -> str:
        return self.name

    def arguments(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        """Return the arguments on `device`."""
        made = self.build(Maker(zlib.crc32(self.name.encode()), dtype))
        return tuple(_moved(part, device) for part in made)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One tensor that is not what the truth says."""

    tensor: str
    problem: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Result:
    """One kernel in one dtype over all cases of its op."""

    op: str
    kernel: str
    dtype: str
    num_cases: int
    worst: float  # largest RMS ratio; nan if nothing was compared
    failures: tuple[str, ...]

    @property
    def is_passed(self) -> bool:
        return not self.failures


def cases_of(op: str) -> tuple[Case, ...]:
    """Return the parity cases of an op. Raises: ModuleNotFoundError if it has none."""
    return importlib.import_module(f"mxn.kernels.ops.{op}.cases").CASES


def typical_cases(op: str) -> list[Case]:
    """Return the cases whose speed decides between kernels."""
    return [case for case in cases_of(op) if case.is_typical]


def compare(
    name: str, want: Tensor, got: Tensor, tolerance: float
) -> tuple[float, Mismatch | None]:
    """Return the RMS ratio of the error, and what is wrong if it is over `tolerance`.

    One element may be off by `OUTLIER` tolerances.
    NaN must stand where the truth has NaN (a poisoned cache) and nowhere else. Integers and
    booleans must be equal.
    """
    got = got.detach().to("cpu")
    if got.shape != want.shape or got.dtype != want.dtype:
        problem = f"is {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
        return math.nan, Mismatch(name, problem)
    if want.numel() == 0:
        return 0.0, None
    if not want.is_floating_point():
        wrong = int((want != got).sum())
        return float(wrong > 0), Mismatch(name, f"{wrong} values differ") if wrong else None
    want64, got64 = want.double(), got.double()
    if not torch.equal(want64.isnan(), got64.isnan()):
        return math.nan, Mismatch(name, f"{int(got64.isnan().sum())} NaN, where the truth has "
                                        f"{int(want64.isnan().sum())}")  # fmt: skip
    if not torch.equal(want64.isinf(), got64.isinf()):
        return math.inf, Mismatch(name, "infinite elsewhere than the truth")
    finite = want64.isfinite()
    error = torch.where(finite, got64 - want64, 0.0)
    size = float(torch.where(finite, want64, 0.0).square().mean().sqrt())
    ratio = float(error.square().mean().sqrt()) / max(size, 1e-30)
    if ratio > tolerance:
        worst = float(error.abs().max())
        problem = f"RMS ratio {ratio:.2e} over {tolerance:.0e}, max abs {worst:.2e}"
        return ratio, Mismatch(name, problem)
    return ratio, _outlier(name, torch.where(finite, want64, 0.0), error, tolerance)


def _outlier(name: str, want: Tensor, error: Tensor, tolerance: float) -> Mismatch | None:
    """Return the element that is off by far more than its row, if there is one.

    In a large tensor a few wrong elements hardly change the RMS.
    """
    whole = float(want.square().mean().sqrt())
    row = want.square().mean(-1, keepdim=True).sqrt() if want.dim() else want.abs()
    allowed = OUTLIER * tolerance * torch.maximum(row.clamp(min=1e-3 * whole), want.abs())
    excess = error.abs() - allowed.clamp(min=1e-30)
    at = int(excess.argmax())
    if float(excess.flatten()[at]) <= 0:
        return None
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), want.shape))
    off, most = float(error.abs().flatten()[at]), float(allowed.expand_as(want).flatten()[at])
    return Mismatch(name, f"element {place} is off by {off:.2e}, more than {most:.2e}")


def check(
    entry: Kernel, case: Case, device: torch.device, dtype: torch.dtype
) -> tuple[float, list[Mismatch]]:
    """Run a kernel on a case; return the largest RMS ratio and what is wrong."""
    truth = registry.kernels_of(entry.op)["naive"].fn
    dtype_name = registry.dtype_name(dtype)
    with torch.inference_mode():
        args = case.arguments(torch.device("cpu"), dtype)
        wanted = case.outputs(args, case.call(truth, args))
        args = case.arguments(device, dtype)
        found = case.outputs(args, case.call(entry.fn, args))
        synchronize(device)
    if wanted.keys() != found.keys():
        return math.nan, [Mismatch("outputs", f"are {list(found)}, not {list(wanted)}")]
    worst, mismatches = 0.0, []
    for name, want in wanted.items():
        ratio, mismatch = compare(name, want, found[name], TOLERANCES[dtype_name] * case.slack)
        worst = max(worst, ratio)
        if mismatch:
            mismatches.append(mismatch)
    return worst, mismatches


def check_kernel(entry: Kernel, device: torch.device, dtype: torch.dtype) -> Result:
    """Run a kernel on all cases of its op that exist in this dtype."""
    name = registry.dtype_name(dtype)
    failures: list[str] = []
    worst, count = 0.0, 0
    for case in cases_of(entry.op):
        if name not in case.dtypes:
            continue
        count += 1
        try:
            ratio, mismatches = check(entry, case, device, dtype)
        except Exception as error:  # a kernel that raises has failed this case, whatever it raised
            failures.append(f"{case}: raised {type(error).__name__}: {error}")
            continue
        worst = max(worst, ratio)
        failures += [f"{case}: {mismatch}" for mismatch in mismatches]
    return Result(entry.op, entry.name, name, count, worst, tuple(failures))


def applicable(chip: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """Yield every kernel that claims this chip and dtype, naive ones excepted."""
    for op in registry.all_ops():
        for entry in registry.kernels_of(op).values():
            is_naive = entry.name == "naive"
            if not is_naive and entry.reject_reason(chip, registry.dtype_name(dtype)) is None:
                yield entry


def verify(chip: str, device: torch.device, dtype: torch.dtype) -> list[Result]:
    """Check all kernels of a chip; store those that fail as off, those that pass as on."""
    results = [check_kernel(entry, device, dtype) for entry in applicable(chip, dtype)]
    Table.open(chip).judge(
        {
            f"{result.op}/{result.kernel} {result.dtype}": None
            if result.is_passed
            else f"failed its parity test: {result.failures[0]}"
            for result in results
        }
    )
    return results


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, Tensor):
        return part.to(device)
    if is_dataclass(part) and any(isinstance(getattr(part, f.name), Tensor) for f in fields(part)):
        tensors = {
            f.name: getattr(part, f.name).to(device)
            for f in fields(part)
            if isinstance(getattr(part, f.name), Tensor)
        }
        return replace(part, **tensors)
    return part
