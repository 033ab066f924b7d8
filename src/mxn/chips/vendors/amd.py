"""AMD GPUs through ROCm, which torch calls `cuda`."""

from __future__ import annotations

from typing import ClassVar

from mxn.chips import smi
from mxn.chips.cuda_alike import CudaAlike


class AmdChip(CudaAlike):
    vendor: ClassVar[str] = "amd"
    title: ClassVar[str] = "AMD"
    tool: ClassVar[str | None] = "rocm-smi"
    query: ClassVar[tuple[str, ...]] = (
        "--showproductname", "--showmeminfo", "vram", "--showuse", "--json",
    )  # fmt: skip
    nodes: ClassVar[tuple[str, ...]] = ("/dev/kfd",)
    visible_devices: ClassVar[str | None] = "HIP_VISIBLE_DEVICES"
    torch_has_it: ClassVar[str | None] = "install the ROCm build of torch"

    def parse(self, text: str) -> list[smi.Row]:
        """Read the JSON, but not of a rocm-smi that Hygon ships: its table says DCU."""
        return smi.rocm_json(text)
