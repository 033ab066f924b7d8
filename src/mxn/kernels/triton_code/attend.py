"""Attention of a block of query heads over a run of positions: what both kernels of
`attention.py` do, with one constant maximum or with a running one.

Letters as there: U query heads of a group, L positions of a tile, J value dims; a head is read in
two pieces of A and B dims. Start at `attend_heads`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scores(
    q_UA,
    q_UB,
    k_UA,
    k_rows_L1,
    inside_L,
    scale,
    softcap,
    A: tl.constexpr,
    B: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Scaled and capped scores [U, L]; minus infinity outside."""
    x_UL = tl.dot(q_UA, tl.trans(k_UA), input_precision="ieee")
    if B > 0:
        dims = tl.arange(0, BLOCK_B)
        mask = inside_L[:, None] & (dims < B)[None, :]
        k_LB = tl.load(k_rows_L1 + A + dims[None, :], mask=mask, other=0.0)
        x_UL += tl.dot(q_UB, tl.trans(k_LB), input_precision="ieee")
    x_UL *= scale
    if HAS_SOFTCAP:  # tanh(y) = 1 - 2 / (exp(2 y) + 1), right at both infinities
        x_UL = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x_UL / softcap) + 1.0))
    return tl.where(inside_L[None, :], x_UL, float("-inf"))


@triton.jit
def _weigh(p_UL, v_LJ, PRECISION: tl.constexpr):
    """Weights times values, summed in float32.

    float16 has too few exponents for exp(x - phi): its values are widened. tf32, where the chip has
    it, keeps the mantissa of float16 and the range of float32.
    """
    if v_LJ.dtype == tl.float16:
        return tl.dot(p_UL, v_LJ.to(tl.float32), input_precision=PRECISION)
    return tl.dot(p_UL.to(v_LJ.dtype), v_LJ, input_precision="ieee")


@triton.jit
def _attend(
    q_UA,
    q_UB,
    begin,
    end,
    table_ptr,
    k_ptr,
    v_ptr,
    k_stride_p,
    k_stride_k,
    v_stride_p,
    v_stride_k,
    scale,
    softcap,
    phi,
    A: tl.constexpr,
    B: tl.constexpr,
    J: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_U: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_LATENT: tl.constexpr,
    IS_UNIFIED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return sums [U, J], denominators [U] and the largest score [U] over positions begin..end.

    Unified: relative to exp(phi). Otherwise relative to the largest score, rescaled when it grows.
    """
    acc_UJ = tl.zeros([BLOCK_U, BLOCK_J], dtype=tl.float32)
    den_U = tl.zeros([BLOCK_U], dtype=tl.float32)
    top_U = tl.full([BLOCK_U], float("-inf"), dtype=tl.float32)
    dims_A = tl.arange(0, BLOCK_A)
    dims_J = tl.arange(0, BLOCK_J)
    for start in range(begin, end, BLOCK_L):
        positions = start + tl.arange(0, BLOCK_L)
        inside = positions < end  # masked loads never touch what lies outside
        pages = tl.load(table_ptr + positions // PAGE, mask=inside, other=0)
        slots = positions % PAGE
        k_rows_L1 = k_ptr + (pages * k_stride_p + slots * k_stride_k)[:, None]
        k_LA = tl.load(
            k_rows_L1 + dims_A[None, :], mask=inside[:, None] & (dims_A < A)[None, :], other=0.0
        )
        x_UL = _scores(
            q_UA, q_UB, k_LA, k_rows_L1, inside, scale, softcap,
            A, B, BLOCK_B, HAS_SOFTCAP,
        )  # fmt: skip
        if IS_LATENT:
            v_LJ = k_LA
        else:
            v_rows_L1 = v_ptr + (pages * v_stride_p + slots * v_stride_k)[:, None]
            v_LJ = tl.load(
                v_rows_L1 + dims_J[None, :], mask=inside[:, None] & (dims_J < J)[None, :], other=0.0
            )
        new_top_U = tl.maximum(top_U, tl.max(x_UL, axis=1))
        if IS_UNIFIED:
            p_UL = tl.exp(x_UL - phi)
        else:
            p_UL = tl.exp(x_UL - new_top_U[:, None])
            shrink_U = tl.exp(top_U - new_top_U)
            acc_UJ *= shrink_U[:, None]
            den_U *= shrink_U
        den_U += tl.sum(p_UL, axis=1)
        acc_UJ += _weigh(p_UL, v_LJ, PRECISION)
        top_U = new_top_U
    return acc_UJ, den_U, top_U


@triton.jit
def heads_of_program(U: tl.constexpr, BLOCK_U: tl.constexpr):
    """Return the key head of this program, its query heads [U], and which of them exist."""
    blocks_of_group: tl.constexpr = (U + BLOCK_U - 1) // BLOCK_U
    group = tl.program_id(1) // blocks_of_group
    in_group_U = (tl.program_id(1) % blocks_of_group) * BLOCK_U + tl.arange(0, BLOCK_U)
    return group, group * U + in_group_U, in_group_U < U


@triton.jit
def row_of_program(
    r,
    rows_ptr,
    sequences_ptr,
    seen_ptr,
    window,
    HAS_ROWS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Return row and sequence of query row r, and the positions first..seen that it sees."""
    row = r
    sequence = r
    if HAS_ROWS:
        row = tl.load(rows_ptr + r)
        sequence = tl.load(sequences_ptr + r)
    seen = tl.load(seen_ptr + r).to(tl.int32)
    first = tl.maximum(seen - window, 0) if HAS_WINDOW else 0
    return row, sequence, seen, first


@triton.jit
def attend_heads(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    row,
    sequence,
    group,
    heads_U,
    is_head_U,
    begin,
    end,
    q_stride_t,
    q_stride_n,
    k_stride_p,
    k_stride_k,
    k_stride_g,
    v_stride_p,
    v_stride_k,
    v_stride_g,
    table_stride,
    scale,
    softcap,
    phi,
    A: tl.constexpr,
    B: tl.constexpr,
    J: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_U: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_LATENT: tl.constexpr,
    IS_UNIFIED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`attend` of the query heads of one row and one key head."""
    q_UA = _load_query(q_ptr, row, heads_U, is_head_U, q_stride_t, q_stride_n, 0, A, BLOCK_A)
    q_UB = _load_query(q_ptr, row, heads_U, is_head_U, q_stride_t, q_stride_n, A, B, BLOCK_B)
    return _attend(
        q_UA, q_UB, begin, end, table_ptr + sequence * table_stride,
        k_ptr + group * k_stride_g, v_ptr + group * v_stride_g,
        k_stride_p, k_stride_k, v_stride_p, v_stride_k, scale, softcap, phi,
        A, B, J, BLOCK_A, BLOCK_B, BLOCK_J, BLOCK_L, BLOCK_U, PAGE,
        HAS_SOFTCAP, IS_LATENT, IS_UNIFIED, PRECISION,
    )  # fmt: skip


@triton.jit
def _load_query(
    q_ptr,
    row_at,
    heads_U,
    is_head_U,
    q_stride_t,
    q_stride_n,
    FIRST: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dims = tl.arange(0, BLOCK)
    at = q_ptr + row_at * q_stride_t + heads_U[:, None] * q_stride_n + FIRST + dims[None, :]
    return tl.load(at, mask=is_head_U[:, None] & (dims < DIMS)[None, :], other=0.0)
