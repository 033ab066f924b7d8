"""Enflame GCUs through torch_gcu."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from mxn.chips import smi
from mxn.chips.accelerator import Accelerator


class EnflameChip(Accelerator):
    vendor: ClassVar[str] = "enflame"
    title: ClassVar[str] = "Enflame"
    torch_type: ClassVar[str] = "gcu"
    collective: ClassVar[str] = "eccl"
    package: ClassVar[str | None] = "torch_gcu"
    tool: ClassVar[str | None] = "efsmi"
    nodes: ClassVar[tuple[str, ...]] = ("/dev/gcu[0-9]*",)
    visible_devices: ClassVar[str | None] = "ENFLAME_VISIBLE_DEVICES"
    environment: ClassVar[Mapping[str, str]] = {"TORCHGCU_INDUCTOR_ENABLE": "0"}

    def parse(self, text: str) -> list[smi.Row]:
        # Total memory only; "DUsed" is the load.
        return smi.table(text, r"(?P<total>\d+)MiB", r"MiB\s+\w+\s*\|\s*(?P<busy>[\d.]+)%")
