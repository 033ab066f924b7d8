"""Root-mean-square norm of rows, alone or after adding a residual: one program for each row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_rows(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    total_ptr,
    x_stride,
    residual_stride,
    num_dims,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    IS_WIDE_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, residual [rows, D] with row strides; normed, total [rows, D] contiguous.

    A wide (float32) weight multiplies before the rounding to x's dtype, another one after it.
    """
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    inside = dims < num_dims
    x = tl.load(x_ptr + row * x_stride + dims, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + dims, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * num_dims + dims, x, mask=inside)
    wide = x.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=0) / num_dims
    normed = wide * tl.rsqrt(mean_square + eps)
    weight = tl.load(weight_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    if not IS_WIDE_WEIGHT:
        normed = normed.to(x.dtype).to(tl.float32)
    tl.store(normed_ptr + row * num_dims + dims, (normed * weight).to(x.dtype), mask=inside)
