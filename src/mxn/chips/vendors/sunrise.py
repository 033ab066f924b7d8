"""Sunrise through the device type `ptpu`. Only names are known, not that of its torch package."""

from __future__ import annotations

from typing import ClassVar

from mxn.chips.accelerator import Accelerator


class SunriseChip(Accelerator):
    vendor: ClassVar[str] = "sunrise"
    title: ClassVar[str] = "Sunrise"
    torch_type: ClassVar[str] = "ptpu"
    collective: ClassVar[str] = "pccl"
    tool: ClassVar[str | None] = "pt_smi"
