"""Cambricon MLUs through torch_mlu."""

from __future__ import annotations

from typing import ClassVar

from mxn.chips import smi
from mxn.chips.accelerator import Accelerator


class CambriconChip(Accelerator):
    vendor: ClassVar[str] = "cambricon"
    title: ClassVar[str] = "Cambricon"
    torch_type: ClassVar[str] = "mlu"
    collective: ClassVar[str] = "cncl"
    package: ClassVar[str | None] = "torch_mlu"
    tool: ClassVar[str | None] = "cnmon"
    nodes: ClassVar[tuple[str, ...]] = ("/dev/cambricon_dev[0-9]*",)
    visible_devices: ClassVar[str | None] = "MLU_VISIBLE_DEVICES"

    def parse(self, text: str) -> list[smi.Row]:
        # The first line ends with the load, the second starts with the fan.
        return smi.table(
            text, r"(?P<used>\d+) MiB/\s*(?P<total>\d+) MiB", r"\|\s*(?P<busy>\d+)%\s+\S+\s*\|"
        )
