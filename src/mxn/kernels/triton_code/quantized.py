"""Flat matrix products with packed weights: int4 by groups (W4A16), and int8 by int8 (W8A8).

Orientation and letters as in `matmul.py`. Layouts: `mxn.kernels.ops.linear.packed`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxn.kernels.triton_code.matmul import part_of_program, store_rows, tile_of_program


@triton.jit
def flat_int4(
    x_ptr,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    parts_ptr,
    num_rows,
    num_in,
    num_out,
    x_stride,
    HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Program (f, m, p): a tile of y over the part p of the groups.

    values [F, D / 2] uint8: within a group, byte i holds number i (low half) and GROUP / 2 + i; so
    both halves meet a run of x, and nothing is shuffled. scales [F, D / GROUP] float32, zeros
    uint8. number - zero is exact in every dtype of x; the scale multiplies the float32 sum.
    """
    half: tl.constexpr = GROUP // 2
    f, m = tile_of_program(BLOCK_F, BLOCK_M)
    is_f, is_m = f < num_out, m < num_rows
    num_groups = num_in // GROUP
    begin, end = part_of_program(num_groups, 1, NUM_PARTS)
    i = tl.arange(0, half)
    w_F1 = w_ptr + f[:, None] * (num_in // 2)
    x_1M = x_ptr + m.to(tl.int64)[None, :] * x_stride
    acc_FM = tl.zeros([BLOCK_F, BLOCK_M], dtype=tl.float32)
    for g in range(begin, end):
        packed = tl.load(w_F1 + g * half + i[None, :], mask=is_f[:, None], other=0)
        zero_F = tl.load(zeros_ptr + f * num_groups + g, mask=is_f, other=0).to(tl.int8)
        scale_F = tl.load(scales_ptr + f * num_groups + g, mask=is_f, other=0.0)
        low_FD = (packed & 15).to(tl.int8) - zero_F[:, None]
        high_FD = (packed >> 4).to(tl.int8) - zero_F[:, None]
        x_at = x_1M + g * GROUP + i[:, None]
        x_low_DM = tl.load(x_at, mask=is_m[None, :], other=0.0)
        x_high_DM = tl.load(x_at + half, mask=is_m[None, :], other=0.0)
        sum_FM = tl.dot(low_FD.to(x_low_DM.dtype), x_low_DM, input_precision="ieee")
        sum_FM = tl.dot(high_FD.to(x_low_DM.dtype), x_high_DM, sum_FM, input_precision="ieee")
        acc_FM += sum_FM * scale_F[:, None]
    store_rows(
        acc_FM, bias_ptr, y_ptr, parts_ptr, f, m, num_rows, num_out, HAS_BIAS, NUM_PARTS
    )  # fmt: skip


@triton.jit
def quantize_rows(x_ptr, values_ptr, scales_ptr, num_in, x_stride, BLOCK_D: tl.constexpr):
    """Program (m): values [M, D] int8 = x / scale to nearest even; scales [M] = max |x| / 127.

    A scale that is not zero is no less than 2^-126, so that its inverse is finite.
    """
    m = tl.program_id(0).to(tl.int64)
    largest_D = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, num_in, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x_D = tl.load(x_ptr + m * x_stride + d, mask=d < num_in, other=0.0).to(tl.float32)
        largest_D = tl.maximum(largest_D, tl.abs(x_D), propagate_nan=tl.PropagateNan.ALL)
    scale = tl.max(largest_D, axis=0) / 127.0
    least: tl.constexpr = 1.1754943508222875e-38  # 2^-126
    scale = tl.where((scale > 0.0) & (scale < least), least, scale)
    tl.store(scales_ptr + m, scale)
    inverse = tl.where(scale > 0.0, 1.0 / scale, 0.0)
    for start in range(0, num_in, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x_D = tl.load(x_ptr + m * x_stride + d, mask=d < num_in, other=0.0).to(tl.float32)
        # Adding and taking away 1.5 * 2^23 rounds to the nearest even integer in float32.
        rounded = (x_D * inverse + 12582912.0) - 12582912.0
        tl.store(values_ptr + m * num_in + d, rounded.to(tl.int8), mask=d < num_in)


@triton.jit
def flat_int8(
    x_ptr,
    x_scales_ptr,
    w_ptr,
    w_scales_ptr,
    bias_ptr,
    y_ptr,
    parts_ptr,
    num_rows,
    num_in,
    num_out,
    HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (f, m, p): a tile of y over the part p of D.

    Products and sums in int32, then both scales, then bias.
    """
    f, m = tile_of_program(BLOCK_F, BLOCK_M)
    is_f, is_m = f < num_out, m < num_rows
    w_F1 = w_ptr + f[:, None] * num_in
    x_1M = x_ptr + m.to(tl.int64)[None, :] * num_in
    begin, end = part_of_program(num_in, BLOCK_D, NUM_PARTS)
    acc_FM = tl.zeros([BLOCK_F, BLOCK_M], dtype=tl.int32)
    for start in range(begin, end, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        is_d = d < end
        w_FD = tl.load(w_F1 + d[None, :], mask=is_f[:, None] & is_d[None, :], other=0)
        x_DM = tl.load(x_1M + d[:, None], mask=is_d[:, None] & is_m[None, :], other=0)
        acc_FM = tl.dot(w_FD, x_DM, acc_FM, out_dtype=tl.int32)
    w_scale_F = tl.load(w_scales_ptr + f, mask=is_f, other=0.0)
    x_scale_M = tl.load(x_scales_ptr + m, mask=is_m, other=0.0)
    y_FM = acc_FM.to(tl.float32) * w_scale_F[:, None] * x_scale_M[None, :]
    store_rows(
        y_FM, bias_ptr, y_ptr, parts_ptr, f, m, num_rows, num_out, HAS_BIAS, NUM_PARTS
    )  # fmt: skip
