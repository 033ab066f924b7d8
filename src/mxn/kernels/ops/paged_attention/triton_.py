"""`paged_attention` in Triton: rows of short sequences by splits with a unified maximum.

A sequence with up to `MAX_ROWS` new tokens is read row by row (decoding, speculation); longer
chunks go the way of `torch`. `decode` knows no host lists and never waits for the device: it can be
captured in a graph. Derivation and the guard: docs/design/0011-triton-kernels.md.

Shape letters: R query rows, P splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxn.kernels import triton_host as host
from mxn.kernels.batch import AttentionBatch
from mxn.kernels.ops.paged_attention.torch_ import prefill_chunks
from mxn.kernels.registry import kernel

MAX_ROWS = 4
DTYPES = ("bfloat16", "float16")  # float32 products have no tensor cores and spill registers
_FINISH_HEADS = 16  # heads of a program that adds splits up


@dataclass(frozen=True, slots=True, kw_only=True)
class UnifiedMax:
    """The constant taken from scores (scaled, capped) before exp, and how far the largest may be.

    The default needs no calibration: terms are exact in float32 for 50 above and below, and for
    contexts up to 2^24 neither sums overflow nor anything above 2^-24 of the largest is lost.
    """

    phi: float = 0.0
    low: float = -50.0
    high: float = 50.0


@dataclass(frozen=True, slots=True)
class Rows:
    """Query rows: row r is token `tokens_R[r]` of sequence `sequences_R[r]`, seeing `seen_R[r]`.

    None for tokens and sequences: row, token and sequence are the same. int64, on the device.
    """

    seen_R: Tensor
    tokens_R: Tensor | None = None
    sequences_R: Tensor | None = None


_recomputed: dict[torch.device, Tensor] = {}


def recomputed(device: torch.device) -> Tensor:
    """Return the count [1] int32 of (row, head) pairs whose guard fired on `device` so far.

    A rising share means that phi does not fit the model. Reading it waits for the device.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _recomputed:
        _recomputed[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _recomputed[device]


@kernel(
    "paged_attention",
    name="triton",
    chips=host.CHIPS,
    dtypes=DTYPES,
    priority=host.PRIORITY,
    missing=host.missing,
    needs_proof=True,
    is_static=True,
)
def paged_attention(
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    out_TNJ = torch.empty(
        *q_TNH.shape[:2], v_cache.shape[-1], dtype=q_TNH.dtype, device=q_TNH.device
    )
    rows, longest = short_rows(batch)
    if rows is not None:
        decode(out_TNJ, q_TNH, k_cache, v_cache, batch.page_table_SP, rows, scale, window=window,
               softcap=softcap, max_context=longest, page_tokens=batch.page_tokens)  # fmt: skip
    if not batch.is_decode:
        prefill_chunks(
            out_TNJ, q_TNH, k_cache, v_cache, batch, scale, window, softcap, least=MAX_ROWS + 1
        )
    return out_TNJ


def short_rows(batch: AttentionBatch) -> tuple[Rows | None, int]:
    """Return the rows of sequences with few new tokens and the longest context among them.

    Kept in the batch for later layers.
    """
    if "triton rows" not in batch.derived:
        batch.derived["triton rows"] = _short_rows(batch)
    return batch.derived["triton rows"]


def _short_rows(batch: AttentionBatch) -> tuple[Rows | None, int]:
    if batch.is_decode and batch.context_lens:
        return Rows(batch.context_lens_S), max(batch.context_lens)
    starts, found, longest = batch.query_starts, [], 0
    for s, context in enumerate(batch.context_lens):
        num_new = starts[s + 1] - starts[s]
        if num_new <= MAX_ROWS:
            found += [(starts[s] + i, s, context - num_new + i + 1) for i in range(num_new)]
            longest = max(longest, context)
    if not found:
        return None, 0
    columns = torch.tensor(found, dtype=torch.int64).T.contiguous()
    tokens_R, sequences_R, seen_R = columns.to(batch.page_table_SP.device)
    return Rows(seen_R, tokens_R, sequences_R), longest


def decode(
    out_TNJ: Tensor,
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table_SP: Tensor,
    rows: Rows,
    scale: float,
    *,
    max_context: int,
    page_tokens: int,
    window: int | None = None,
    softcap: float | None = None,
    latent_dims: int | None = None,
    unified: UnifiedMax | None = UnifiedMax(),
    num_splits: int | None = None,
) -> None:
    """Attend for `rows` and write their rows of `out_TNJ` (contiguous).

    `max_context` only bounds the number of splits: a captured graph passes the longest it may see.
    `latent_dims`: values are the first so many dims of the keys, `v_cache` is not read.
    `unified` None: each split keeps its own maximum (FlashDecoding), nothing is ever recomputed.
    """
    from mxn.kernels.triton_code import attention as code

    if rows.seen_R.numel() == 0:
        return
    shape = _Shape.of(q_TNH, k_cache, out_TNJ, latent_dims)
    visible = max_context if window is None else min(max_context, window)
    num_rows = len(rows.seen_R)
    blocks = shape.groups * host.ceil_div(shape.per_group, shape.block_u)
    splits = num_splits or choose_splits(num_rows * blocks, visible, shape.block_l, q_TNH.device)
    parts = (num_rows, q_TNH.shape[1], splits)
    sums = torch.empty(*parts, shape.j, dtype=torch.float32, device=q_TNH.device)
    dens, tops = (torch.empty(parts, dtype=torch.float32, device=q_TNH.device) for _ in range(2))
    q_TNH, k_cache, v_cache = (_dims_in_a_row(x) for x in (q_TNH, k_cache, v_cache))
    tokens_R = rows.seen_R if rows.tokens_R is None else rows.tokens_R
    sequences_R = rows.seen_R if rows.sequences_R is None else rows.sequences_R
    tensors = (q_TNH, k_cache, v_cache, page_table_SP, tokens_R, sequences_R, rows.seen_R,
               sums, dens, tops)  # fmt: skip
    strides = (*q_TNH.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
               page_table_SP.stride(0))  # fmt: skip
    guard = unified or UnifiedMax()
    numbers = (q_TNH.shape[1], float(scale), float(softcap or 0.0), window or 0, float(guard.phi))
    constants = shape.constants() | {
        "PAGE": page_tokens,
        "HAS_ROWS": rows.tokens_R is not None,
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "IS_LATENT": latent_dims is not None,
        "IS_UNIFIED": unified is not None,
        "PRECISION": "tf32" if host.has_tf32(q_TNH) else "ieee",
        "num_warps": shape.num_warps,
        "num_stages": shape.num_stages,
    }
    host.launch(
        code.attend_splits, (num_rows, blocks, splits), *tensors, *strides, *numbers, **constants
    )
    blocks = shape.groups * host.ceil_div(shape.per_group, _FINISH_HEADS)
    constants["BLOCK_U"] = _FINISH_HEADS
    host.launch(
        code.finish, (num_rows, blocks), *tensors, out_TNJ, recomputed(q_TNH.device), splits,
        *strides, *numbers, float(guard.low), float(guard.high), **constants,
    )  # fmt: skip


def choose_splits(num_programs: int, context: int, block: int, device: torch.device) -> int:
    """Return into how many parts each context is cut: enough to fill the chip twice, at most 64.

    A part has at least two tiles, so that the loop overlaps loading and arithmetic.
    """
    wanted = host.ceil_div(2 * host.num_processors(device), num_programs)
    return max(1, min(wanted, context // (2 * block), 64))


@dataclass(frozen=True, slots=True)
class _Shape:
    """Tile sizes of one head shape. Estimates: no GPU was at hand to measure them."""

    groups: int
    per_group: int
    a: int
    b: int
    j: int
    block_u: int
    block_l: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, q_TNH: Tensor, k_cache: Tensor, out_TNJ: Tensor, latent: int | None) -> _Shape:
        groups, dim = k_cache.shape[2:]
        per_group = q_TNH.shape[1] // groups
        whole = host.power_of_two(dim)
        a = latent or (dim if whole - dim < dim // 8 or dim < 32 else whole // 2)
        is_wide = a > 256 or out_TNJ.shape[-1] > 256
        # 64 KiB of shared memory on AMD; float32 takes twice the room everywhere.
        is_small = host.backend() == "hip" or q_TNH.dtype == torch.float32
        block_u = min(host.power_of_two(per_group, 16), (16 if is_small else 32) if is_wide else 64)
        block_l = (16 if is_small else 32) if is_wide else (32 if is_small else 64)
        return cls(
            groups, per_group, a, dim - a, out_TNJ.shape[-1], block_u, block_l,
            num_warps=8 if is_wide else 4, num_stages=1 if is_small else 2,
        )  # fmt: skip

    def constants(self) -> dict[str, int]:
        return {
            "U": self.per_group,
            "A": self.a,
            "B": self.b,
            "J": self.j,
            "BLOCK_A": host.power_of_two(self.a, 16),
            "BLOCK_B": host.power_of_two(self.b, 16),
            "BLOCK_J": host.power_of_two(self.j, 16),
            "BLOCK_L": self.block_l,
            "BLOCK_U": self.block_u,
        }


def _dims_in_a_row(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
