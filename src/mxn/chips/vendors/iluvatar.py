"""Iluvatar CoreX GPUs, which torch calls `cuda`. Backend name `nccl` is unverified."""

from __future__ import annotations

from typing import ClassVar

from mxn.chips import smi
from mxn.chips.cuda_alike import CudaAlike


class IluvatarChip(CudaAlike):
    vendor: ClassVar[str] = "iluvatar"
    title: ClassVar[str] = "Iluvatar CoreX"
    tool: ClassVar[str | None] = "ixsmi"
    nodes: ClassVar[tuple[str, ...]] = ("/dev/iluvatar[0-9]*",)
    torch_has_it: ClassVar[str | None] = "install the CoreX build of torch"

    def parse(self, text: str) -> list[smi.Row]:
        # The first percentage is the fan; the load follows the memory.
        return smi.table(
            text, r"(?P<used>\d+)MiB / (?P<total>\d+)MiB", r"MiB\s*\|\s*(?P<busy>\d+)%"
        )
