"""Hygon DCU through DTK, a HIP build that torch calls `cuda`. Backend name `nccl` is unverified."""

from __future__ import annotations

import re
from typing import ClassVar

from mxn.chips import smi
from mxn.chips.cuda_alike import CudaAlike

# DCU  Temp   AvgPwr  Fan   Perf  PwrCap  VRAM%  DCU%   (HCU in newer versions)
_LINE = re.compile(r"^\s*(\d+)\s+[\d.]+c\s.*\s(?P<busy>[\d.]+)%\s*$", re.IGNORECASE)


class HygonChip(CudaAlike):
    vendor: ClassVar[str] = "hygon"
    title: ClassVar[str] = "Hygon"
    tool: ClassVar[str | None] = "hy-smi"
    nodes: ClassVar[tuple[str, ...]] = ("/dev/kfd",)
    visible_devices: ClassVar[str | None] = "HIP_VISIBLE_DEVICES"
    torch_has_it: ClassVar[str | None] = "install the DTK build of torch"

    def parse(self, text: str) -> list[smi.Row]:
        """Read the summary table, which names no model and prints memory in percent only."""
        return [
            smi.Row(int(found[1]), "DCU", busy=float(found["busy"]) / 100)
            for found in map(_LINE.match, text.splitlines())
            if found
        ]
