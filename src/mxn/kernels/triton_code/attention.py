"""Attention of single query rows over pages, by splits of the context. Start at `attend_splits`.

Unified maximum (FlashDecoding++, arXiv 2311.01282, section 3): every split takes exp(x - phi) with
one constant phi, so splits and tiles exchange no maximum and rescale nothing. Each (row, split)
carries its largest x; `finish` adds the splits up and recomputes, with the running maximum, the
rows whose largest x left the guarded range or whose sums are not finite.

Letters: R query rows, U query heads of a group, P splits, L positions of a tile, J value dims.
A head is read in two pieces of A and B dims (192 = 128 + 64, latent and rotary dims of MLA), each
padded to a power of two: less waste than one padding of the whole.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxn.kernels.triton_code.attend import attend_heads, heads_of_program, row_of_program


@triton.jit
def attend_splits(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    rows_ptr,
    sequences_ptr,
    seen_ptr,
    sums_ptr,
    dens_ptr,
    tops_ptr,
    q_stride_t,
    q_stride_n,
    k_stride_p,
    k_stride_k,
    k_stride_g,
    v_stride_p,
    v_stride_k,
    v_stride_g,
    table_stride,
    num_heads,
    scale,
    softcap,
    window,
    phi,
    U: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    J: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_U: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_LATENT: tl.constexpr,
    IS_UNIFIED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (r, block of heads, p): the part p of the context of row r, for heads of one group.

    q [T, N, A + B]; caches [pages, PAGE, G, dims], dims contiguous; table [S, pages] int64;
    rows, sequences, seen [R] int64 (without HAS_ROWS row r is token and sequence r).
    Writes sums [R, N, P, J], dens and tops [R, N, P], all float32.
    """
    r = tl.program_id(0).to(tl.int64)
    part = tl.program_id(2)
    num_parts = tl.num_programs(2)
    group, heads_U, is_head_U = heads_of_program(U, BLOCK_U)
    row, sequence, seen, first = row_of_program(
        r, rows_ptr, sequences_ptr, seen_ptr, window, HAS_ROWS, HAS_WINDOW
    )
    tiles = tl.cdiv(tl.cdiv(seen - first, num_parts), BLOCK_L)
    begin = first + part * tiles * BLOCK_L
    end = tl.minimum(begin + tiles * BLOCK_L, seen)
    acc_UJ, den_U, top_U = attend_heads(
        q_ptr, k_ptr, v_ptr, table_ptr, row, sequence, group, heads_U, is_head_U, begin, end,
        q_stride_t, q_stride_n, k_stride_p, k_stride_k, k_stride_g,
        v_stride_p, v_stride_k, v_stride_g, table_stride, scale, softcap, phi,
        A, B, J, BLOCK_A, BLOCK_B, BLOCK_J, BLOCK_L, BLOCK_U, PAGE,
        HAS_SOFTCAP, IS_LATENT, IS_UNIFIED, PRECISION,
    )  # fmt: skip
    at_U = (r * num_heads + heads_U) * num_parts + part
    dims = tl.arange(0, BLOCK_J)
    mask = is_head_U[:, None] & (dims < J)[None, :]
    tl.store(sums_ptr + at_U[:, None] * J + dims[None, :], acc_UJ, mask=mask)
    tl.store(dens_ptr + at_U, den_U, mask=is_head_U)
    tl.store(tops_ptr + at_U, top_U, mask=is_head_U)


@triton.jit
def finish(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    rows_ptr,
    sequences_ptr,
    seen_ptr,
    sums_ptr,
    dens_ptr,
    tops_ptr,
    out_ptr,
    recomputed_ptr,
    num_parts,
    q_stride_t,
    q_stride_n,
    k_stride_p,
    k_stride_k,
    k_stride_g,
    v_stride_p,
    v_stride_k,
    v_stride_g,
    table_stride,
    num_heads,
    scale,
    softcap,
    window,
    phi,
    low,
    high,
    U: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    J: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_U: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_LATENT: tl.constexpr,
    IS_UNIFIED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (r, block of heads): add the splits up, divide, recompute rows whose guard fired.

    Writes out [T, N, J] (contiguous) at its rows; adds the number of recomputed (row, head) pairs
    to recomputed [1] int32. A row that sees nothing (padding of a captured graph) becomes zero.
    """
    r = tl.program_id(0).to(tl.int64)
    group, heads_U, is_head_U = heads_of_program(U, BLOCK_U)
    dims = tl.arange(0, BLOCK_J)
    mask = is_head_U[:, None] & (dims < J)[None, :]
    at_U = (r * num_heads + heads_U) * num_parts
    top_U = tl.full([BLOCK_U], float("-inf"), dtype=tl.float32)
    for part in range(0, num_parts):
        part_top_U = tl.load(tops_ptr + at_U + part, mask=is_head_U, other=0.0)
        top_U = tl.maximum(top_U, part_top_U, propagate_nan=tl.PropagateNan.ALL)
    acc_UJ = tl.zeros([BLOCK_U, BLOCK_J], dtype=tl.float32)
    den_U = tl.zeros([BLOCK_U], dtype=tl.float32)
    for part in range(0, num_parts):
        sums_UJ = tl.load(
            sums_ptr + (at_U + part)[:, None] * J + dims[None, :], mask=mask, other=0.0
        )
        part_den_U = tl.load(dens_ptr + at_U + part, mask=is_head_U, other=0.0)
        if not IS_UNIFIED:
            weight_U = tl.exp(tl.load(tops_ptr + at_U + part, mask=is_head_U, other=0.0) - top_U)
            sums_UJ *= weight_U[:, None]
            part_den_U *= weight_U
        acc_UJ += sums_UJ
        den_U += part_den_U
    row, sequence, seen, first = row_of_program(
        r, rows_ptr, sequences_ptr, seen_ptr, window, HAS_ROWS, HAS_WINDOW
    )
    is_real_U = is_head_U & (seen > 0)
    out_UJ = acc_UJ / tl.where(is_real_U, den_U, 1.0)[:, None]
    at_UJ = out_ptr + (row * num_heads + heads_U)[:, None] * J + dims[None, :]
    if not IS_UNIFIED:
        out_UJ = tl.where(is_real_U[:, None], out_UJ, 0.0)
        tl.store(at_UJ, out_UJ.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        # Written so that a NaN fires too. Sums that overflowed are infinite or NaN; 0 * inf = NaN.
        is_good_U = (top_U - phi <= high) & (top_U - phi >= low)
        zero_U = tl.sum(tl.where(mask, out_UJ, 0.0) * 0.0, axis=1)
        bad_U = tl.where(is_good_U & (zero_U == 0.0), 0, 1)
        bad_U = tl.where(is_real_U, bad_U, 0)
        # Stored before the recomputation, not merged after it: fewer registers are alive.
        good = mask & (bad_U == 0)[:, None]
        tl.store(at_UJ, out_UJ.to(out_ptr.dtype.element_ty), mask=good)
        num_bad = tl.sum(bad_U, axis=0)
        if num_bad > 0:
            tl.atomic_add(recomputed_ptr, num_bad, sem="relaxed")
            safe_UJ, safe_den_U, _ = attend_heads(
                q_ptr, k_ptr, v_ptr, table_ptr, row, sequence, group, heads_U, is_head_U,
                first, seen, q_stride_t, q_stride_n, k_stride_p, k_stride_k, k_stride_g,
                v_stride_p, v_stride_k, v_stride_g, table_stride, scale, softcap, phi,
                A, B, J, BLOCK_A, BLOCK_B, BLOCK_J, BLOCK_L, BLOCK_U, PAGE,
                HAS_SOFTCAP, IS_LATENT, False, PRECISION,
            )  # fmt: skip
            safe_UJ = (safe_UJ / safe_den_U[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(at_UJ, safe_UJ, mask=mask & (bad_U == 1)[:, None])
