"""T-Head PPU, which torch calls `cuda`. Backend name `nccl` is unverified."""

from __future__ import annotations

from typing import ClassVar

from mxn.chips.cuda_alike import QUERY, CudaAlike


class TheadChip(CudaAlike):
    vendor: ClassVar[str] = "thead"
    title: ClassVar[str] = "T-Head"
    tool: ClassVar[str | None] = "ppu-smi"
    query: ClassVar[tuple[str, ...]] = (f"--query-gpu={QUERY}", "--format=csv,noheader,nounits")
    nodes: ClassVar[tuple[str, ...]] = ("/dev/alixpu*",)
    torch_has_it: ClassVar[str | None] = "install the PPU build of torch"
