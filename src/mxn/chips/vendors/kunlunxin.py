"""Kunlunxin XPUs through a shim that torch calls `cuda`; XCCL is called `nccl`.

The tool shares its name with Intel's `xpu-smi`; only the header tells them apart.
"""

from __future__ import annotations

from typing import ClassVar

from mxn.chips import smi
from mxn.chips.cuda_alike import CudaAlike


class KunlunxinChip(CudaAlike):
    vendor: ClassVar[str] = "kunlunxin"
    title: ClassVar[str] = "Kunlunxin"
    tool: ClassVar[str | None] = "xpu-smi"
    nodes: ClassVar[tuple[str, ...]] = ("/dev/xpu[0-9]*",)
    torch_has_it: ClassVar[str | None] = "install xpytorch"

    def parse(self, text: str) -> list[smi.Row]:
        if "XPU-RT" not in text:
            return []
        return smi.table(
            text, r"(?P<used>\d+)MiB / (?P<total>\d+)MiB", r"MiB\s*\|\s*(?P<busy>\d+)%"
        )
