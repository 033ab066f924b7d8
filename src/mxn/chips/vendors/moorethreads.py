"""Moore Threads GPUs through torch_musa."""

from __future__ import annotations

from typing import ClassVar

from mxn.chips import smi
from mxn.chips.accelerator import Accelerator


class MooreThreadsChip(Accelerator):
    vendor: ClassVar[str] = "moorethreads"
    title: ClassVar[str] = "Moore Threads"
    torch_type: ClassVar[str] = "musa"
    collective: ClassVar[str] = "mccl"
    package: ClassVar[str | None] = "torch_musa"
    tool: ClassVar[str | None] = "mthreads-gmi"
    nodes: ClassVar[tuple[str, ...]] = ("/dev/mtgpu.[0-9]*",)
    visible_devices: ClassVar[str | None] = "MTHREADS_VISIBLE_DEVICES"

    def parse(self, text: str) -> list[smi.Row]:
        return smi.table(text, r"(?P<used>\d+)MiB\((?P<total>\d+)MiB\)", r"\|(?P<busy>\d+)%")
