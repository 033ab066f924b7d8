"""Huawei Ascend NPUs through torch_npu. A 910C shows as two devices of 64 GB."""

from __future__ import annotations

from typing import ClassVar

from mxn.chips import smi
from mxn.chips.accelerator import Accelerator


class AscendChip(Accelerator):
    vendor: ClassVar[str] = "ascend"
    title: ClassVar[str] = "Huawei Ascend"
    torch_type: ClassVar[str] = "npu"
    collective: ClassVar[str] = "hccl"
    package: ClassVar[str | None] = "torch_npu"
    tool: ClassVar[str | None] = "npu-smi"
    query: ClassVar[tuple[str, ...]] = ("info",)
    nodes: ClassVar[tuple[str, ...]] = ("/dev/davinci[0-9]*",)
    visible_devices: ClassVar[str | None] = "ASCEND_RT_VISIBLE_DEVICES"

    def parse(self, text: str) -> list[smi.Row]:
        # Second line: AICore(%), then host memory, then HBM; the last pair is the device's.
        return smi.table(
            text,
            r"(?P<used>\d+)\s*/\s*(?P<total>\d+)\s*\|\s*$",
            r"[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[\w.]+\s*\|\s*(?P<busy>\d+)",
        )
