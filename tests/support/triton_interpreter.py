"""Runs Triton kernels on the CPU, in Triton's interpreter. Call `start` before they are loaded.

Repairs make the interpreter do what chips do with bfloat16, which it keeps as uint16: float32 is
rounded to nearest even (it cuts off), integers become numbers and `tl.dot` multiplies numbers (it
takes both for the bits).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from typing import Any

import numpy as np
import torch


def absence() -> str | None:
    """Return why kernels cannot be interpreted in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 7):
        return f"the interpreter of triton {version} fails with numpy {np.__version__}; 3.7 works"
    if torch.cuda.is_available():
        return "kernels run compiled where there is a GPU: test_triton_gpu.py"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if any(name.startswith("mxn.kernels.triton_code.") for name in sys.modules):
        return "device code is already loaded for a GPU"
    return None


def start() -> None:
    """Make every kernel that is loaded from now on run in the interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder, "_rounds_bfloat16", False):
        return
    _reinterpret_library()
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        target = dst_type.scalar
        if src.dtype.scalar == tl.bfloat16 and target == tl.float32:
            return TensorHandle(_widened(src.data), target)
        if src.dtype.scalar.is_int() and target == tl.bfloat16:
            return TensorHandle(_rounded(src.data.astype(np.float32)), target)
        if src.dtype.scalar == tl.float32 and target == tl.bfloat16:
            return TensorHandle(_rounded(src.data), target)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        wide = [
            TensorHandle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        ]
        return dot(self, *wide, d, *options)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder._rounds_bfloat16 = True


def _reinterpret_library() -> None:
    """Make triton's own device functions interpreted too, if another module loaded them first."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for module in (tl, tl.standard):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    up = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return np.where(np.isnan(values), np.uint32(0x7FC0), (bits + up) >> 16).astype(np.uint16)
