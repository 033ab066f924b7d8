"""Intel Gaudi through habana_frameworks. Its HCCL is not Ascend's; both are called `hccl`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mxn.chips import smi
from mxn.chips.accelerator import Accelerator

if TYPE_CHECKING:
    from mxn.chips.chip import Device
    from mxn.chips.probe import Probe


class GaudiChip(Accelerator):
    vendor: ClassVar[str] = "gaudi"
    title: ClassVar[str] = "Intel Gaudi"
    torch_type: ClassVar[str] = "hpu"
    collective: ClassVar[str] = "hccl"
    package: ClassVar[str | None] = "habana_frameworks"
    tool: ClassVar[str | None] = "hl-smi"
    query: ClassVar[tuple[str, ...]] = (
        "-Q", "index,name,memory.total,memory.used,utilization.aip", "-f", "csv,noheader",
    )  # fmt: skip
    nodes: ClassVar[tuple[str, ...]] = ("/dev/accel/accel[0-9]*",)

    def detect(self, probe: Probe) -> list[Device]:
        """Look only where Habana's own tool or package is: other makers use /dev/accel too."""
        if not probe.which("hl-smi") and not probe.has_module("habana_frameworks"):
            return []
        return super().detect(probe)

    def parse(self, text: str) -> list[smi.Row]:
        return smi.csv(text)
