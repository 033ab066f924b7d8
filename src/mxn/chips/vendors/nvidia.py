"""NVIDIA GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mxn.chips.cuda_alike import QUERY, CudaAlike

if TYPE_CHECKING:
    from mxn.chips.probe import TorchDevice


class NvidiaChip(CudaAlike):
    vendor: ClassVar[str] = "nvidia"
    title: ClassVar[str] = "NVIDIA"
    tool: ClassVar[str | None] = "nvidia-smi"
    query: ClassVar[tuple[str, ...]] = (f"--query-gpu={QUERY}", "--format=csv,noheader,nounits")
    nodes: ClassVar[tuple[str, ...]] = ("/dev/nvidia[0-9]*",)
    torch_has_it: ClassVar[str | None] = "install the CUDA build of torch"

    def native_dtypes(self, found: TorchDevice) -> tuple[str, ...]:
        """Return dtypes by compute capability: bf16 from 8.0, int8 from 7.5, fp8 from 8.9."""
        level = int(found.arch.removeprefix("sm_")) if found.arch.startswith("sm_") else 0
        table = (("bfloat16", 80), ("float16", 70), ("int8", 75), ("float8_e4m3fn", 89))
        return ("float32", *(dtype for dtype, needs in table if level >= needs))
