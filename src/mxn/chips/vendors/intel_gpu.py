"""Intel GPUs through torch's own XPU backend."""

from __future__ import annotations

from typing import ClassVar

from mxn.chips import smi
from mxn.chips.accelerator import Accelerator


class IntelGpuChip(Accelerator):
    vendor: ClassVar[str] = "intel"
    title: ClassVar[str] = "Intel GPU"
    torch_type: ClassVar[str] = "xpu"
    collective: ClassVar[str] = "xccl"
    tool: ClassVar[str | None] = "xpu-smi"
    query: ClassVar[tuple[str, ...]] = ("discovery", "-j")
    nodes: ClassVar[tuple[str, ...]] = ("/sys/bus/pci/drivers/xe/0000:*",)
    visible_devices: ClassVar[str | None] = "ZE_AFFINITY_MASK"
    torch_has_it: ClassVar[str | None] = "install the XPU build of torch"

    def parse(self, text: str) -> list[smi.Row]:
        return smi.intel_json(text)
