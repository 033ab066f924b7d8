"""What every Triton kernel asks before and at its launch. Imports neither triton nor device code.

Start at `missing`, which the registry asks, and `launch`, through which every kernel goes: so a
tool can compile what would be launched, for a chip that is not here (`tools/compile_triton.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["cuda", "hip"]
Runner = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]

CHIPS = "nvidia-*|amd-*"
# Below torch: it runs where nothing could be measured, and must be beaten by 5 % where it could.
PRIORITY = -1
_CPU_PROCESSORS = 8  # stands for the chip's count in the interpreter
_MIN_CAPABILITY = {"bfloat16": (8, 0)}


@dataclass(frozen=True, slots=True)
class Target:
    """A chip that launch parameters are for although it is not here."""

    backend: Backend
    num_processors: int
    has_tf32: bool


def missing(dtype: str) -> str | None:
    """Return why Triton kernels cannot run in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    needs = _MIN_CAPABILITY.get(dtype, (7, 0))
    has = torch.cuda.get_device_capability()
    if torch.version.hip is None and has < needs:
        return f"{dtype} needs compute capability {needs[0]}.{needs[1]}, this is {has[0]}.{has[1]}"
    return None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` on a grid of programs; an empty grid is no work.

    `options` are constants of the kernel and `num_warps`, `num_stages`.
    """
    if all(grid):
        _runner(kernel, grid, args, options)


def backend() -> Backend:
    """Return which compiler the launch parameters are for."""
    if _target:
        return _target.backend
    return "hip" if torch.version.hip else "cuda"


def num_processors(device: torch.device) -> int:
    """Return how many programs the chip runs side by side (SMs or compute units)."""
    if _target:
        return _target.num_processors
    return _processors_of(device) if device.type == "cuda" else _CPU_PROCESSORS


def has_tf32(x: Tensor) -> bool:
    """Return whether float32 products may be taken as tf32: x is narrower and the chip has it."""
    if x.dtype == torch.float32:
        return False
    if _target:
        return _target.has_tf32
    if x.device.type != "cuda" or backend() == "cuda":
        return True
    return _architecture_of(x.device).startswith("gfx942")


@cache
def _architecture_of(device: torch.device) -> str:
    return torch.cuda.get_device_properties(device).gcnArchName


@cache
def _processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(size: int, least: int = 1) -> int:
    """Return the least power of two that is at least `size` and `least`."""
    return max(least, 1 << max(0, size - 1).bit_length())


def ceil_div(size: int, part: int) -> int:
    return -(-size // part)


@contextmanager
def redirected(runner: Runner, target: Target) -> Iterator[None]:
    """Hand launches to `runner`, with the launch parameters of `target`. For tools and tests."""
    global _runner, _target
    before = _runner, _target
    _runner, _target = runner, target
    try:
        yield
    finally:
        _runner, _target = before


def _run(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    device = next(part.device for part in args if isinstance(part, Tensor))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
    else:  # triton starts kernels on the current device, whatever the tensors say
        with torch.cuda.device(device):
            kernel[grid](*args, **options)


_runner: Runner = _run
_target: Target | None = None
