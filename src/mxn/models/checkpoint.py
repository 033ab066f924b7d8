"""The tensors of a model, read lazily: a Hugging Face directory of safetensors, or a GGUF file.

Knows no model family. Quantized weights (FP8 with `weight_scale_inv`, and the formats of
`mxn.models.quantized`) are dequantized on the way out, so whoever asks sees plain numbers; who can
compute with them as they are asks for `quantized`. Start at `Checkpoint.read`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mxn.errors import NotFoundError, UnsupportedError
from mxn.models.quantized import find_format
from mxn.models.storage import open_storage, read_json

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.models.quantized import Format
    from mxn.models.quantized.matrix import QuantizedMatrix

__all__ = ["Checkpoint", "Progress", "read_json"]

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes in all)."""


class Checkpoint:
    """Read access to all tensors of a model."""

    def __init__(self, directory: Path, *, on_progress: Progress | None = None) -> None:
        """`directory`: of the model, or its GGUF file.

        Raises: NotFoundError for missing files; UnsupportedError for weights that are quantized in
        a way mxn does not read.
        """
        self.directory = directory
        self.storage, self.config_json = open_storage(directory)
        self.format = find_format(self.config_json)
        self._on_progress = on_progress
        self._bytes_read = 0
        self.num_bytes = self.storage.num_bytes
        self._stored = frozenset(self.storage.names)
        self._unread = set(self._stored)
        self.num_parameters = 0  # of what was read, in numbers as the model computes with them

    def __contains__(self, name: str) -> bool:
        return name in self._stored or self._quantized_module(name) is not None

    @property
    def names(self) -> list[str]:
        """Names as stored; a quantized weight may be several tensors under names of their own."""
        return sorted(self._stored)

    @property
    def unread(self) -> list[str]:
        """Tensors nobody asked for yet: after a load these are what the model does not use."""
        return sorted(self._unread)

    def is_stored(self, name: str) -> bool:
        """Whether there is a tensor of that very name."""
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor as it is stored."""
        return self.storage.shape(name)

    def is_quantized(self, module: str) -> bool:
        """Whether the weight of `module` is stored quantized."""
        return self.format is not None and self.format.holds(self, module)

    def quantized(self, module: str) -> QuantizedMatrix | None:
        """Return the weight of `module` as it is quantized; None when it is stored plainly.

        Raises: UnsupportedError when its tensors do not fit together.
        """
        if self.format is None or not self.format.holds(self, module):
            return None
        return self._matrix(self.format, module)

    def _matrix(self, format: Format, module: str) -> QuantizedMatrix:
        matrix = format.read(self, module)
        self.num_parameters += matrix.values.numel()
        return matrix

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, in its stored dtype (quantized ones as float32).

        Raises: NotFoundError when the checkpoint has no such tensor.
        """
        module = self._quantized_module(name)
        if module is not None:
            assert self.format is not None
            return self._matrix(self.format, module).dequantize()
        tensor = self.raw(name)
        scale_name = f"{name}_scale_inv"
        if scale_name in self:
            tensor = self._dequantize(name, tensor, self.raw(scale_name))
        elif tensor.is_floating_point() and tensor.itemsize == 1:
            raise UnsupportedError(f"{name} is {tensor.dtype} without {scale_name} beside it")
        elif not tensor.is_floating_point():
            raise UnsupportedError(
                f"{name} is {tensor.dtype}: the checkpoint is quantized in a way mxn does not read",
                hint="serve the checkpoint it was made from",
            )
        self.num_parameters += tensor.numel()
        return tensor

    def _dequantize(self, name: str, weight: Tensor, scale: Tensor) -> Tensor:
        """Undo the scaling of a weight, by one number or by one for each block."""
        import torch

        from mxn.kernels.ops.dequant_fp8.torch_ import dequant_fp8

        block = (self.config_json.get("quantization_config") or {}).get("weight_block_size")
        if scale.numel() == 1:
            block = tuple(weight.shape)
            scale = scale.reshape(1, 1)
        block = tuple(block) if block else (128, 128)
        blocks = tuple(-(-size // part) for size, part in zip(weight.shape, block, strict=True))
        if tuple(scale.shape) != blocks:
            raise UnsupportedError(
                f"{name}_scale_inv is {tuple(scale.shape)}; blocks of {block} in a weight of"
                f" {tuple(weight.shape)} need {blocks}"
            )
        return dequant_fp8(weight, scale.float(), block, torch.float32)

    def raw(self, name: str) -> Tensor:
        """Return a tensor as it is stored. Raises: NotFoundError."""
        if name not in self._stored:
            close = [other for other in self.names if other.split(".")[-2:] == name.split(".")[-2:]]
            raise NotFoundError(
                f"{self.directory} has no tensor {name!r}"
                + (f"; it has {close[:3]}" if close else ""),
                hint="the checkpoint is incomplete, or config.json names the wrong architecture",
            )
        tensor = self.storage.read(name)
        self.count(name, tensor.numel() * tensor.itemsize)
        return tensor

    def count(self, name: str, num_bytes: int) -> None:
        """Note that a tensor was read, for `unread` and for the progress report."""
        self._unread.discard(name)
        self._bytes_read += num_bytes
        if self._on_progress:
            self._on_progress(min(self._bytes_read, self.num_bytes), self.num_bytes)

    def _quantized_module(self, name: str) -> str | None:
        """Return the module whose weight `name` is, if that is stored quantized."""
        if self.format is None or not name.endswith(".weight"):
            return None
        module = name.removesuffix(".weight")
        return module if self.format.holds(self, module) else None
