"""Drive the native kernels by hand: guarded outputs, exact int8 rounding, a cache read back.

Knows the layouts of `csrc/common.h`, written down a second time on purpose; knows no models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mxn.kernels.native import library, missing_reason
from mxn.kernels.native.pack import PackedWeight

GUARD = 0x7FDEAD00  # a NaN that no kernel makes
LANES = 16


def usable_variants() -> list[str]:
    """Return the variants this processor runs, the best first; none when they are not built."""
    if missing_reason() is not None:
        return []
    return [name for name, is_usable in library().variants() if is_usable]


class Guarded:
    """A float32 [rows, columns] inside memory that nobody may write."""

    def __init__(self, rows: int, columns: int, *, gap: int = 0, fill: float | None = None) -> None:
        self.rows, self.columns, self.ld = rows, columns, columns + gap
        size = 64 + rows * self.ld + 64
        self._bits = torch.full((size,), GUARD, dtype=torch.int32)
        if fill is not None:
            self.value.fill_(fill)

    @property
    def value(self) -> Tensor:
        whole = self._bits.view(torch.float32)[64 : 64 + self.rows * self.ld]
        return whole.view(self.rows, self.ld)[:, : self.columns]

    @property
    def address(self) -> int:
        return self._bits.data_ptr() + 64 * 4

    def check(self) -> None:
        """Fail when something outside was written, or something inside was not."""
        inside = torch.zeros_like(self._bits, dtype=torch.bool)
        body = inside[64 : 64 + self.rows * self.ld].view(self.rows, self.ld)
        body[:, : self.columns] = True
        is_guard = self._bits == GUARD
        assert is_guard[~inside].all(), "written outside of the result"
        assert not is_guard[inside].any(), "a value of the result was not written"


def quantized(x_MK: Tensor, k_padded: int, group: int) -> tuple[Tensor, Tensor]:
    """Return what the kernels make of activations: int8 [M, K padded] and scales [M, G]."""
    rows, k = x_MK.shape
    x_MK = x_MK.contiguous()
    groups = k_padded // group
    assert groups * group == k_padded
    q = torch.full((rows, k_padded), 77, dtype=torch.int8)
    scales, sums = torch.empty(rows, groups), torch.empty(rows, groups)
    isums = torch.empty(rows, groups, dtype=torch.int32)
    for m in range(rows):
        library().quantize(
            x_MK[m].data_ptr(), k, k_padded, group, q[m].data_ptr(), scales[m].data_ptr(),
            sums[m].data_ptr(), isums[m].data_ptr(),
        )  # fmt: skip
    wide = q.view(rows, groups, group).long().sum(-1)
    finite = scales.isfinite()
    assert torch.equal(isums.long()[finite], wide[finite])
    assert torch.equal(sums[finite], (scales * isums)[finite])
    return q, scales


def act_group(weight: PackedWeight) -> int:
    """Return the columns of an activation that share a scale before `weight`."""
    return weight.format.group or weight.in_padded


def read_rows(weight: PackedWeight, x_MK: Tensor) -> Tensor:
    """Return float64 [M, K]: the activations as a product with `weight` sees them."""
    if not weight.format.is_quantized:
        return x_MK.double()
    group = act_group(weight)
    q, scales = quantized(x_MK, weight.in_padded, group)
    wide = q.double().view(len(q), -1, group) * scales.double()[..., None]
    return wide.view(len(q), -1)[:, : weight.in_features]


def magnitude(weight: PackedWeight) -> Tensor:
    """Return float64 [F, K]: what a product adds up in size, the part of the minimum included."""
    plain = weight.dequantize().double().abs()
    if weight.mins is None:
        return plain
    mins = (
        weight.mins.double().abs().transpose(1, 2).reshape(-1, weight.mins.shape[1]) * weight.gain
    )
    wide = mins.repeat_interleave(act_group(weight), 1)
    return plain + 2 * wide[: weight.out_features, : weight.in_features]


@dataclass
class PagedCache:
    """One layer's cache of `num_pages`, every byte 0xFF (NaN) until it is written."""

    kind: str  # f32, bf16, i8
    heads: int
    k_dim: int
    v_dim: int
    latent: int = 0
    page_tokens: int = 16
    num_pages: int = 8
    shape: Any = field(init=False)
    memory: Tensor = field(init=False)
    pages: Tensor = field(init=False)
    _known: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        lib = library()
        self.shape = lib.CacheShape()
        self.shape.type = getattr(lib.CacheType, self.kind)
        self.shape.heads, self.shape.k_dim, self.shape.v_dim = self.heads, self.k_dim, self.v_dim
        self.shape.latent, self.shape.page_tokens = self.latent, self.page_tokens
        self.shape.num_pages = self.num_pages
        size = self.shape.page_bytes
        guarded = torch.full((64 + size * self.num_pages + 64,), 0xFF, dtype=torch.uint8)
        guarded[:64], guarded[-64:] = 0xA5, 0xA5
        self._guarded = guarded
        self.memory = guarded[64:-64]
        order = torch.randperm(self.num_pages, generator=torch.Generator().manual_seed(5))
        self.pages = order.to(torch.int64)

    def write(self, position: int, head: int, k: Tensor, v: Tensor | None) -> None:
        self._known.clear()
        k = k.contiguous()
        v = torch.empty(0) if v is None else v.contiguous()
        library().cache_write(
            self.shape, self.memory.data_ptr(), self.pages.data_ptr(), position, head,
            k.data_ptr(), v.data_ptr(),
        )  # fmt: skip

    def check(self) -> None:
        assert (self._guarded[:64] == 0xA5).all()
        assert (self._guarded[-64:] == 0xA5).all()

    def read(self, position: int, head: int) -> tuple[Tensor, Tensor]:
        """Return float64 key and value of one token, out of the bytes."""
        if (position, head) not in self._known:
            self._known[position, head] = self._read(position, head)
        return self._known[position, head]

    def value_scale(self, position: int, head: int) -> float:
        """Return what the int8 values of one token are multiplied by."""
        block = self._block(position, head)
        return float(block[-4 * LANES :].view(torch.float32)[position % LANES])

    def _block(self, position: int, head: int) -> Tensor:
        """Return the bytes of the block in which a token lies."""
        item = {"f32": 4, "bf16": 2, "i8": 1}[self.kind]
        extra = 64 * (2 if self.v_dim else 1) if self.kind == "i8" else 0
        block_bytes = LANES * (self.k_dim + self.v_dim) * item + extra
        parts = self.page_tokens // LANES
        page = int(self.pages[position // self.page_tokens])
        part = position % self.page_tokens // LANES
        start = ((head * self.num_pages + page) * parts + part) * block_bytes
        return self.memory[start : start + block_bytes].clone()

    def _read(self, position: int, head: int) -> tuple[Tensor, Tensor]:
        item = {"f32": 4, "bf16": 2, "i8": 1}[self.kind]
        extra = 64 * (2 if self.v_dim else 1) if self.kind == "i8" else 0
        block, slot = self._block(position, head), position % LANES
        keys, values = block[: LANES * self.k_dim * item], block[LANES * self.k_dim * item :]
        values = values[: LANES * self.v_dim * item]
        if self.kind == "i8":
            scales = block[-extra:].view(torch.float32).double().view(-1, LANES)
            k = keys.view(-1, LANES, 4)[:, slot].reshape(-1).double() - 128
            k = k * scales[0, slot]
            v = values.view(torch.int8).view(LANES // 4, -1, 4)[slot // 4, :, slot % 4].double()
            v = v * scales[-1, slot]
        else:
            dtype = torch.float32 if self.kind == "f32" else torch.bfloat16
            k = keys.view(dtype).view(-1, LANES)[:, slot].double()
            v = values.view(dtype).view(LANES, -1)[slot].double()
        return k, (v if self.v_dim else k[: self.latent])


def attend(
    cache: PagedCache,
    head: int,
    q_RH: Tensor,
    limits: list[int],
    *,
    begin: int = 0,
    end: int | None = None,
    window: int = 0,
    scale: float = 1.0,
    softcap: float = 0.0,
    phi: float = 0.0,
    margin: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sums [R, J], denominators [R], references [R] and flags [R] of one native call."""
    rows, width = len(q_RH), cache.v_dim or cache.latent
    out = Guarded(rows, width)
    den, ref = Guarded(rows, 1), Guarded(rows, 1)
    flags = torch.full((rows,), 9, dtype=torch.uint8)
    limits_R = torch.tensor(limits, dtype=torch.int64)
    q_RH = q_RH.contiguous()
    library().attend(
        cache.shape, cache.memory.data_ptr(), cache.pages.data_ptr(), head, rows, q_RH.data_ptr(),
        limits_R.data_ptr(), begin, max(limits) if end is None else end, window, scale, softcap,
        phi, margin, out.address, den.address, ref.address, flags.data_ptr(),
    )  # fmt: skip
    for part in (out, den, ref):
        part.check()
    assert set(flags.tolist()) <= {0, 1}
    return out.value.clone(), den.value[:, 0].clone(), ref.value[:, 0].clone(), flags
