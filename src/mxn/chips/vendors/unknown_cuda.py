"""Devices that answer to `cuda`, of a maker nobody can tell. Only reference kernels run on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mxn.chips.cuda_alike import CudaAlike

if TYPE_CHECKING:
    from mxn.chips.probe import Probe


class UnknownCudaChip(CudaAlike):
    vendor: ClassVar[str] = "unknown"
    title: ClassVar[str] = "cuda device of an unknown maker"

    def claims(self) -> str | None:
        return None

    def absence(self, probe: Probe) -> str:
        return "no 'cuda' device without a known maker"
