"""Flat matrix products: few rows of x, a weight that is read once. Start at `flat`.

The weight is the left operand, so that rows of x are the dimension that tensor cores take in eights
(FlashDecoding++ section 4: pad M to 8, not to 64). Loading the next tile during the product on this
one (double buffering) is `num_stages=2` or more of the loop over D.

Shape letters: M rows of x, D in features, F out features, P parts of D.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gemv(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    num_in,
    num_out,
    x_stride,
    w_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (f, m): y [M, F] = x [M, D] @ w [F, D]^T, row by row and without tensor cores."""
    m = tl.program_id(1).to(tl.int64)
    f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_f = f < num_out
    acc = tl.zeros([BLOCK_F, BLOCK_D], dtype=tl.float32)
    for start in range(0, num_in, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        is_d = d < num_in
        x_D = tl.load(x_ptr + m * x_stride + d, mask=is_d, other=0.0).to(tl.float32)
        mask = is_f[:, None] & is_d[None, :]
        w_FD = tl.load(w_ptr + f[:, None] * w_stride + d[None, :], mask=mask, other=0.0)
        acc += w_FD.to(tl.float32) * x_D[None, :]
    y_F = tl.sum(acc, axis=1)
    if HAS_BIAS:
        y_F += tl.load(bias_ptr + f, mask=is_f, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * num_out + f, y_F.to(y_ptr.dtype.element_ty), mask=is_f)


@triton.jit
def tile_of_program(BLOCK_F: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the out features [F] and rows [M] of this program's tile."""
    f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    return f, m


@triton.jit
def part_of_program(size, BLOCK: tl.constexpr, NUM_PARTS: tl.constexpr):
    """Return where this program's part of `size` begins and ends: whole blocks but for the last."""
    blocks = tl.cdiv(tl.cdiv(size, BLOCK), NUM_PARTS)
    begin = tl.program_id(2) * blocks * BLOCK
    return begin, tl.minimum(begin + blocks * BLOCK, size)


@triton.jit
def store_rows(
    acc_FM,
    bias_ptr,
    y_ptr,
    parts_ptr,
    f,
    m,
    num_rows,
    num_out,
    HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    """Write y [M, F], or one part [P, M, F] in float32 for `add_parts`."""
    mask = (f < num_out)[:, None] & (m < num_rows)[None, :]
    at = m.to(tl.int64)[None, :] * num_out + f[:, None]
    if NUM_PARTS > 1:
        part = tl.program_id(2).to(tl.int64)
        tl.store(parts_ptr + part * num_rows * num_out + at, acc_FM, mask=mask)
    else:
        if HAS_BIAS:
            acc_FM += tl.load(bias_ptr + f, mask=f < num_out, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptr + at, acc_FM.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def flat(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    parts_ptr,
    num_rows,
    num_in,
    num_out,
    x_stride,
    w_stride,
    HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (f, m, p): a tile of y [M, F] = x [M, D] @ w [F, D]^T over the part p of D."""
    f, m = tile_of_program(BLOCK_F, BLOCK_M)
    begin, end = part_of_program(num_in, BLOCK_D, NUM_PARTS)
    acc_FM = tl.zeros([BLOCK_F, BLOCK_M], dtype=tl.float32)
    w_F1 = w_ptr + f[:, None] * w_stride
    x_1M = x_ptr + m.to(tl.int64)[None, :] * x_stride
    for start in range(begin, end, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        is_d = d < end
        w_FD = tl.load(w_F1 + d[None, :], mask=(f < num_out)[:, None] & is_d[None, :], other=0.0)
        x_DM = tl.load(x_1M + d[:, None], mask=is_d[:, None] & (m < num_rows)[None, :], other=0.0)
        acc_FM = tl.dot(w_FD, x_DM, acc_FM, input_precision="ieee")
    store_rows(
        acc_FM, bias_ptr, y_ptr, parts_ptr, f, m, num_rows, num_out, HAS_BIAS, NUM_PARTS
    )  # fmt: skip


@triton.jit
def add_parts(
    parts_ptr,
    bias_ptr,
    y_ptr,
    num_out,
    size,
    HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (i): y [M, F] = sum of parts [P, M, F] in their order, plus bias; size = M F."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in tl.static_range(NUM_PARTS):
        total += tl.load(parts_ptr + part * size + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % num_out, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)
