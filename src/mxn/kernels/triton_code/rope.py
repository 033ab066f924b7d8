"""Rotary embedding of query and key heads in one launch: one program for each token."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rotate_heads(
    x_ptr,
    out_ptr,
    token,
    stride_t,
    stride_n,
    cos_1R,
    sin_1R,
    num_heads,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    turns = tl.arange(0, BLOCK_R)
    first = 2 * turns if IS_INTERLEAVED else turns
    second = 2 * turns + 1 if IS_INTERLEAVED else turns + HALF
    for start in range(0, num_heads, BLOCK_N):
        heads = start + tl.arange(0, BLOCK_N)
        inside = (heads < num_heads)[:, None] & (turns < HALF)[None, :]
        x_N1 = x_ptr + token * stride_t + heads[:, None] * stride_n
        out_N1 = out_ptr + (token * num_heads + heads[:, None]) * HEAD_DIM
        a = tl.load(x_N1 + first[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_N1 + second[None, :], mask=inside, other=0.0).to(tl.float32)
        dtype = out_ptr.dtype.element_ty
        tl.store(out_N1 + first[None, :], (a * cos_1R - b * sin_1R).to(dtype), mask=inside)
        tl.store(out_N1 + second[None, :], (b * cos_1R + a * sin_1R).to(dtype), mask=inside)
        if 2 * HALF < HEAD_DIM:
            rest = 2 * HALF + tl.arange(0, BLOCK_REST)
            passed = (heads < num_heads)[:, None] & (rest < HEAD_DIM)[None, :]
            tl.store(
                out_N1 + rest[None, :], tl.load(x_N1 + rest[None, :], mask=passed), mask=passed
            )


@triton.jit
def rotate(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_stride_t,
    q_stride_n,
    k_stride_t,
    k_stride_n,
    num_heads,
    num_groups,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """q [T, N, H], k [T, G, H] with strides; cos, sin [T, HALF] float32; results contiguous."""
    token = tl.program_id(0).to(tl.int64)
    turns = tl.arange(0, BLOCK_R)
    is_turn = turns < HALF
    cos_1R = tl.load(cos_ptr + token * HALF + turns, mask=is_turn, other=0.0)[None, :]
    sin_1R = tl.load(sin_ptr + token * HALF + turns, mask=is_turn, other=0.0)[None, :]
    _rotate_heads(
        q_ptr, q_out_ptr, token, q_stride_t, q_stride_n, cos_1R, sin_1R, num_heads,
        HEAD_DIM, HALF, IS_INTERLEAVED, BLOCK_N, BLOCK_R, BLOCK_REST,
    )  # fmt: skip
    _rotate_heads(
        k_ptr, k_out_ptr, token, k_stride_t, k_stride_n, cos_1R, sin_1R, num_groups,
        HEAD_DIM, HALF, IS_INTERLEAVED, BLOCK_N, BLOCK_R, BLOCK_REST,
    )  # fmt: skip
