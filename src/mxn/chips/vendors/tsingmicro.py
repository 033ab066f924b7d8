"""Tsingmicro through torch_txda. Only names are known; the format of tsm_smi is not public."""

from __future__ import annotations

from typing import ClassVar

from mxn.chips.accelerator import Accelerator


class TsingmicroChip(Accelerator):
    vendor: ClassVar[str] = "tsingmicro"
    title: ClassVar[str] = "Tsingmicro"
    torch_type: ClassVar[str] = "txda"
    collective: ClassVar[str] = "tccl"
    package: ClassVar[str | None] = "torch_txda"
    tool: ClassVar[str | None] = "tsm_smi"
