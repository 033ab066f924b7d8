"""compressed-tensors checkpoints (llm-compressor): W8A8 and W4A16, integers only.

int-quantized: `weight` int8 [out, in], `weight_scale` [out, groups] and, when asymmetric,
`weight_zero_point` int8 likewise. pack-quantized: `weight_packed` int32 [out, words], lowest bits
first, value + 2**(bits - 1); `weight_shape`; `weight_zero_point` packed on the output dim;
`weight_g_idx` with act-order. Source: the compressors of the compressed-tensors package.
Quantized activations are not imported: they are a matter of the kernel. Start at
`CompressedFormat.read`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mxn.errors import UnsupportedError
from mxn.models.quantized.gptq import act_order, group_size
from mxn.models.quantized.matrix import QuantizedMatrix, compact_zeros
from mxn.models.quantized.packing import unpack_words

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.models.checkpoint import Checkpoint

_LAYOUTS = ("int-quantized", "pack-quantized", "naive-quantized", "mixed-precision", "dense")
_STRATEGIES = ("channel", "group", "tensor")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedFormat:
    """Everything else is read from the tensors: groups of modules may differ in bits."""

    name = "compressed-tensors"

    def holds(self, checkpoint: Checkpoint, module: str) -> bool:
        return checkpoint.is_stored(f"{module}.weight_packed") or (
            checkpoint.is_stored(f"{module}.weight")
            and checkpoint.is_stored(f"{module}.weight_scale")
        )

    def read(self, checkpoint: Checkpoint, module: str) -> QuantizedMatrix:
        """Return the weight of `module`.

        Raises: NotFoundError for a missing tensor; UnsupportedError when shapes do not fit.
        """
        if checkpoint.is_stored(f"{module}.weight_packed"):
            return _read_packed(checkpoint, module)
        return _read_int8(checkpoint, module)


def _read_int8(checkpoint: Checkpoint, module: str) -> QuantizedMatrix:
    import torch

    where = f"{module} of {checkpoint.directory}"
    weight = checkpoint.raw(f"{module}.weight")
    if weight.dtype != torch.int8:
        raise UnsupportedError(f"{where}: weight is {weight.dtype}; with a scale only int8 is read")
    rows = weight.shape[0]
    scales = _per_group(where, checkpoint.raw(f"{module}.weight_scale"), rows).float()
    zeros = torch.full(scales.shape, 128, dtype=torch.int32)
    if checkpoint.is_stored(f"{module}.weight_zero_point"):
        stored = _per_group(where, checkpoint.raw(f"{module}.weight_zero_point"), rows)
        zeros += _same_shape(where, stored, scales).int()
    return _matrix(
        where, (weight.to(torch.int16) + 128).to(torch.uint8), 8, scales, compact_zeros(zeros)
    )


def _read_packed(checkpoint: Checkpoint, module: str) -> QuantizedMatrix:
    import torch

    where = f"{module} of {checkpoint.directory}"
    words = checkpoint.raw(f"{module}.weight_packed")
    rows, columns = (int(size) for size in checkpoint.raw(f"{module}.weight_shape"))
    bits = _bits(where, words, rows, columns)
    values = unpack_words(words, bits, 1)[:, :columns].contiguous()
    scales = _per_group(where, checkpoint.raw(f"{module}.weight_scale"), rows).float()
    zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8)
    if checkpoint.is_stored(f"{module}.weight_zero_point"):
        packed = checkpoint.raw(f"{module}.weight_zero_point")
        zeros = _same_shape(where, unpack_words(packed, bits, 0)[:rows], scales)
    index = None
    if checkpoint.is_stored(f"{module}.weight_g_idx"):
        index = checkpoint.raw(f"{module}.weight_g_idx").long()
    return _matrix(where, values, bits, scales, zeros, index)


def _matrix(
    where: str,
    values: Tensor,
    bits: int,
    scales: Tensor,
    zeros: Tensor,
    index: Tensor | None = None,
) -> QuantizedMatrix:
    group = group_size(where, values.shape[1], scales.shape[1])
    perm = act_order(where, index, group)
    if perm is not None:
        values = values[:, perm].contiguous()
    return QuantizedMatrix(
        values=values, bits=bits, group=group, scales=scales, zeros=zeros, perm=perm
    )


def _bits(where: str, words: Tensor, rows: int, columns: int) -> int:
    """Return the bits per value, which follow from the shapes."""
    for bits in (4, 8):
        if tuple(words.shape) == (rows, -(-columns * bits // 32)):
            return bits
    raise UnsupportedError(
        f"{where}: weight_packed {list(words.shape)} holds neither 4 nor 8 bits of"
        f" {[rows, columns]}, its weight_shape",
        hint="serve a 4-bit version, or the checkpoint it was made from",
    )


def _per_group(where: str, tensor: Tensor, rows: int) -> Tensor:
    """Return one number per row and group, from any strategy: tensor, channel or group."""
    if tensor.numel() == 1:
        return tensor.reshape(1, 1).repeat(rows, 1)
    if tensor.dim() == 1:
        tensor = tensor.unsqueeze(1)
    if tensor.dim() != 2 or tensor.shape[0] != rows:
        raise UnsupportedError(f"{where}: {list(tensor.shape)} scales or zeros for {rows} rows")
    return tensor


def _same_shape(where: str, zeros: Tensor, scales: Tensor) -> Tensor:
    if zeros.shape != scales.shape:
        raise UnsupportedError(
            f"{where}: zero points {list(zeros.shape)} do not fit scales {list(scales.shape)}"
        )
    return zeros


def detect(quantization: dict[str, Any]) -> CompressedFormat | None:
    """Return the format that a `quantization_config` describes; None if it is another method.

    Raises: UnsupportedError, with the reason, for a variant that is not read.
    """
    if quantization.get("quant_method") != "compressed-tensors":
        return None
    reason = _why_not(quantization)
    if reason:
        raise UnsupportedError(
            f"the weights are quantized (compressed-tensors) in a way mxn does not read: {reason}",
            hint="W8A8 (int) and W4A16 are read; else serve the checkpoint it was made from",
        )
    return CompressedFormat()


def _why_not(quantization: dict[str, Any]) -> str | None:
    groups = quantization.get("config_groups") or {}
    layouts = {quantization.get("format")} | {group.get("format") for group in groups.values()}
    unknown = sorted(str(layout) for layout in layouts - {None} if layout not in _LAYOUTS)
    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if unknown or not groups:
        return f"format {', '.join(unknown)}" if unknown else "no config_groups"
    if quantization.get("quantization_status", "compressed") != "compressed":
        return f"quantization_status {quantization['quantization_status']!r}, not 'compressed'"
    if sparsity != "dense":
        return f"sparsity {sparsity!r}"
    if (quantization.get("transform_config") or {}).get("config_groups"):
        return "its transform_config rotates activations"
    return next(
        filter(None, (_why_not_group(g.get("weights") or {}) for g in groups.values())), None
    )


def _why_not_group(weights: dict[str, Any]) -> str | None:
    kind, bits, strategy = (weights.get(key) for key in ("type", "num_bits", "strategy"))
    if kind == "int" and bits in (4, 8) and strategy in _STRATEGIES:
        return None
    return f"weights of type {kind!r}, {bits!r} bits, strategy {strategy!r}"
