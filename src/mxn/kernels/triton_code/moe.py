"""Gated feed-forward experts over rows sorted by expert, touching the experts that are used only.

A block is up to BLOCK_M rows of one expert. How many blocks there are is known on the device alone:
the grid has room for the most there can be and the programs behind the last return at once. So the
host never waits, and the launch can be captured in a graph.

Orientation as in `matmul.py`: weights left, rows right. Letters: X sorted (token, choice) pairs,
D hidden size, I inner size, F = 2 I.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _activate(x, KIND: tl.constexpr):
    if KIND == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        y = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(KIND == "relu")
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return y


@triton.jit
def _rows_of_block(first_rows_ptr, end_rows_ptr, BLOCK_M: tl.constexpr):
    """Return the sorted places [M] of this program's block, and which of them exist."""
    rows = tl.load(first_rows_ptr + tl.program_id(1)) + tl.arange(0, BLOCK_M)
    return rows, rows < tl.load(end_rows_ptr + tl.program_id(1))


@triton.jit
def gate_up(
    x_ptr,
    w_ptr,
    hidden_ptr,
    order_ptr,
    experts_ptr,
    first_rows_ptr,
    end_rows_ptr,
    num_in,
    num_inner,
    x_stride,
    w_stride_e,
    w_stride_f,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (i, block): hidden [X, I] = act(gate @ x) * (up @ x), rows in sorted order.

    order [X]: pair at each sorted place; experts, first_rows, end_rows [blocks] int64; an expert of
    NUM_EXPERTS marks a block that does not exist.
    """
    expert = tl.load(experts_ptr + tl.program_id(1))
    if expert >= NUM_EXPERTS:
        return
    rows, is_row = _rows_of_block(first_rows_ptr, end_rows_ptr, BLOCK_M)
    tokens = tl.load(order_ptr + rows, mask=is_row, other=0) // TOP_K
    i = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_i = i < num_inner
    gate_F1 = w_ptr + expert * w_stride_e + i[:, None] * w_stride_f
    up_F1 = w_ptr + expert * w_stride_e + (i + num_inner)[:, None] * w_stride_f
    x_1M = x_ptr + tokens[None, :] * x_stride
    gate_FM = tl.zeros([BLOCK_F, BLOCK_M], dtype=tl.float32)
    up_FM = tl.zeros([BLOCK_F, BLOCK_M], dtype=tl.float32)
    for start in range(0, num_in, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        is_d = d < num_in
        mask = is_i[:, None] & is_d[None, :]
        x_DM = tl.load(x_1M + d[:, None], mask=is_d[:, None] & is_row[None, :], other=0.0)
        w_FD = tl.load(gate_F1 + d[None, :], mask=mask, other=0.0)
        gate_FM = tl.dot(w_FD, x_DM, gate_FM, input_precision="ieee")
        w_FD = tl.load(up_F1 + d[None, :], mask=mask, other=0.0)
        up_FM = tl.dot(w_FD, x_DM, up_FM, input_precision="ieee")
    hidden_FM = (_activate(gate_FM, KIND) * up_FM).to(hidden_ptr.dtype.element_ty)
    at = rows[None, :] * num_inner + i[:, None]
    tl.store(hidden_ptr + at, hidden_FM, mask=is_i[:, None] & is_row[None, :])


@triton.jit
def down(
    hidden_ptr,
    w_ptr,
    y_ptr,
    order_ptr,
    experts_ptr,
    first_rows_ptr,
    end_rows_ptr,
    num_inner,
    num_out,
    w_stride_e,
    w_stride_d,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (d, block): y [X, D] = down @ hidden, written back in the order of the pairs."""
    expert = tl.load(experts_ptr + tl.program_id(1))
    if expert >= NUM_EXPERTS:
        return
    rows, is_row = _rows_of_block(first_rows_ptr, end_rows_ptr, BLOCK_M)
    pairs = tl.load(order_ptr + rows, mask=is_row, other=0)
    o = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_o = o < num_out
    w_F1 = w_ptr + expert * w_stride_e + o[:, None] * w_stride_d
    hidden_1M = hidden_ptr + rows[None, :] * num_inner
    y_FM = tl.zeros([BLOCK_F, BLOCK_M], dtype=tl.float32)
    for start in range(0, num_inner, BLOCK_D):
        i = start + tl.arange(0, BLOCK_D)
        is_i = i < num_inner
        w_FD = tl.load(w_F1 + i[None, :], mask=is_o[:, None] & is_i[None, :], other=0.0)
        h_DM = tl.load(hidden_1M + i[:, None], mask=is_i[:, None] & is_row[None, :], other=0.0)
        y_FM = tl.dot(w_FD, h_DM, y_FM, input_precision="ieee")
    at = pairs[None, :] * num_out + o[:, None]
    tl.store(y_ptr + at, y_FM.to(y_ptr.dtype.element_ty), mask=is_o[:, None] & is_row[None, :])


@triton.jit
def combine(y_ptr, weights_ptr, out_ptr, num_dims, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Program (t, d): out [T, D] = sum over choices of weight * y, in float32, in their order."""
    token = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = dims < num_dims
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        weight = tl.load(weights_ptr + pair).to(tl.float32)
        y = tl.load(y_ptr + pair * num_dims + dims, mask=inside, other=0.0).to(tl.float32)
        total += weight * y
    tl.store(out_ptr + token * num_dims + dims, total.to(out_ptr.dtype.element_ty), mask=inside)
