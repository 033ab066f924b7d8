"""MetaX GPUs through MACA, which torch calls `cuda`; its MCCL is called `nccl`."""

from __future__ import annotations

from typing import ClassVar

from mxn.chips import smi
from mxn.chips.cuda_alike import CudaAlike


class MetaxChip(CudaAlike):
    vendor: ClassVar[str] = "metax"
    title: ClassVar[str] = "MetaX"
    tool: ClassVar[str | None] = "mx-smi"
    nodes: ClassVar[tuple[str, ...]] = ("/dev/mxcd",)
    torch_has_it: ClassVar[str | None] = "install the MACA build of torch"

    def parse(self, text: str) -> list[smi.Row]:
        return smi.table(text, r"(?P<used>\d+)/(?P<total>\d+) MiB", r"(?P<busy>\d+)%")
