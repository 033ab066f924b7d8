"""Biren GPUs through torch_br. Names of the tool and of the collective library are unverified."""

from __future__ import annotations

from typing import ClassVar

from mxn.chips import smi
from mxn.chips.accelerator import Accelerator


class BirenChip(Accelerator):
    vendor: ClassVar[str] = "biren"
    title: ClassVar[str] = "Biren"
    torch_type: ClassVar[str] = "supa"
    collective: ClassVar[str] = "sccl"
    package: ClassVar[str | None] = "torch_br"
    tool: ClassVar[str | None] = "brsmi"
    nodes: ClassVar[tuple[str, ...]] = ("/dev/biren/card_[0-9]*",)
    visible_devices: ClassVar[str | None] = "SUPA_VISIBLE_DEVICES"

    def parse(self, text: str) -> list[smi.Row]:
        # No public sample of the table is known; read as the common ancestor prints it.
        return smi.table(
            text, r"(?P<used>\d+)\s*MiB\s*/\s*(?P<total>\d+)\s*MiB", r"MiB\s*\|\s*(?P<busy>\d+)\s*%"
        )
