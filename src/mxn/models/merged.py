"""A checkpoint whose weights have a LoRA adapter added: for weights that are packed afterwards.

Knows names, shapes and one sum; what an adapter may hold is `lora_files`' business. Start at
`MergedCheckpoint`. Source: W + scale * B A, arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mxn.errors import UnsupportedError
from mxn.models.checkpoint import Checkpoint
from mxn.models.lora_files import read_adapter

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.models.lora_files import Pair
    from mxn.models.quantized.matrix import QuantizedMatrix


class MergedCheckpoint(Checkpoint):
    """Reads weights as they are with the adapter; those it names are float32."""

    def __init__(self, directory: Path, adapter: Path) -> None:
        """`adapter`: a folder in PEFT's layout.

        Raises: as `Checkpoint` and `read_adapter`; UnsupportedError when the adapter names a module
        that the checkpoint does not hold.
        """
        super().__init__(directory)
        self._adapter = read_adapter(adapter)
        self._pairs = {f"{module}.weight": pair for module, pair in self._adapter.pairs.items()}
        self._refuse({name for name in self._pairs if name not in self}, "does not hold")
        self._unmerged = set(self._pairs)

    def check(self) -> None:
        """Call when all is read. Raises: UnsupportedError when a part of the adapter is not in."""
        self._refuse(self._unmerged, "has no use for")

    def is_quantized(self, module: str) -> bool:
        return f"{module}.weight" not in self._pairs and super().is_quantized(module)

    def quantized(self, module: str) -> QuantizedMatrix | None:
        return None if f"{module}.weight" in self._pairs else super().quantized(module)

    def read(self, name: str) -> Tensor:
        weight, pair = super().read(name), self._pairs.get(name)
        if pair is None:
            return weight
        self._unmerged.discard(name)
        return self._merged(name, weight.float(), pair)

    def _merged(self, name: str, weight_FD: Tensor, pair: Pair) -> Tensor:
        shape = (pair.b_FR.shape[0], pair.a_RD.shape[1])
        if tuple(weight_FD.shape) != shape:
            raise UnsupportedError(
                f"the adapter has {name} as {shape}, the checkpoint as {tuple(weight_FD.shape)}",
                hint=self._base(),
            )
        return weight_FD.addmm(pair.b_FR.float(), pair.a_RD.float(), alpha=pair.scale)

    def _refuse(self, names: set[str], what: str) -> None:
        if names:
            modules = sorted(name.removesuffix(".weight") for name in names)
            raise UnsupportedError(
                f"{self.directory.name} {what} {len(modules)} of the modules that the adapter"
                f" names: {', '.join(modules[:3])}",
                hint=self._base(),
            )

    def _base(self) -> str:
        return f"the adapter was trained on {self._adapter.base or 'an unnamed model'}"
