"""GPTQ checkpoints (AutoGPTQ, GPTQModel, Intel and Qwen exports): `qweight`, `qzeros`, `scales`.

Layout of a module of `in` columns and `out` rows, with p = 32 / bits values in an int32 word,
lowest bits first: qweight [in / p, out]; qzeros [groups, out / p]; scales [groups, out];
g_idx [in], the group of each column. Source: the packers of AutoGPTQ and GPTQModel.
Format "gptq" stores zero - 1 (so 15 means 16: AutoGPTQ's kernels do not wrap around), "gptq_v2" the
zero itself. Start at `GptqFormat.read`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mxn.errors import UnsupportedError
from mxn.models.quantized.matrix import QuantizedMatrix, compact_zeros
from mxn.models.quantized.packing import unpack_words

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.models.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqFormat:
    """What `quantization_config` says that the tensors do not."""

    bits: int
    zero_offset: int  # added to a stored zero: 1 in the first format, 0 in gptq_v2

    name = "gptq"

    def holds(self, checkpoint: Checkpoint, module: str) -> bool:
        return checkpoint.is_stored(f"{module}.qweight")

    def read(self, checkpoint: Checkpoint, module: str) -> QuantizedMatrix:
        """Return the weight of `module`.

        Raises: NotFoundError for a missing tensor; UnsupportedError when shapes do not fit.
        """
        words, zero_words, scales = (
            checkpoint.raw(f"{module}.{part}") for part in ("qweight", "qzeros", "scales")
        )
        has_index = checkpoint.is_stored(f"{module}.g_idx")
        index = checkpoint.raw(f"{module}.g_idx").long() if has_index else None
        where = f"{module} of {checkpoint.directory}"
        in_features = words.shape[0] * 32 // self.bits
        if index is not None and index.numel() != in_features:
            raise UnsupportedError(
                f"{where}: g_idx names {index.numel()} columns, qweight has {in_features} of"
                f" {self.bits} bits",
                hint="the module was quantized with other bits than quantization_config says",
            )
        group = group_size(where, in_features, scales.shape[0])
        perm = act_order(where, index, group)
        values = unpack_words(words, self.bits, 0)
        values = (values if perm is None else values[perm]).t().contiguous()
        zeros = unpack_words(zero_words, self.bits, 1).to(dtype=_int32()) + self.zero_offset
        check_shapes(where, values, scales, zeros)
        return QuantizedMatrix(
            values=values,
            bits=self.bits,
            group=group,
            scales=scales.t().float().contiguous(),
            zeros=compact_zeros(zeros.t().contiguous()),
            perm=perm,
        )


def detect(quantization: dict[str, Any]) -> GptqFormat | None:
    """Return the format that a `quantization_config` describes; None if it is not GPTQ.

    Raises: UnsupportedError for a variant of GPTQ that is not read.
    """
    if quantization.get("quant_method") != "gptq":
        return None
    form = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    bits = quantization.get("bits")
    if form not in ("gptq", "gptq_v2"):
        raise UnsupportedError(
            f"the weights are quantized (gptq) in the layout {form!r}; gptq and gptq_v2 are read",
            hint="convert it to the gptq layout, or serve the checkpoint it was made from",
        )
    if bits not in (4, 8):
        raise UnsupportedError(
            f"the weights are quantized (gptq) to {bits!r} bits; 4 and 8 are read",
            hint="serve a 4-bit version, or the checkpoint it was made from",
        )
    return GptqFormat(bits=bits, zero_offset=0 if form == "gptq_v2" else 1)


def group_size(where: str, in_features: int, num_groups: int) -> int:
    """Return columns per group. Raises: UnsupportedError if the groups are not equally wide."""
    if num_groups < 1 or in_features % num_groups:
        raise UnsupportedError(
            f"{where}: {num_groups} groups do not divide {in_features} columns",
            hint="quantize it again with a group size that divides every layer",
        )
    return in_features // num_groups


def act_order(where: str, index: Tensor | None, group: int) -> Tensor | None:
    """Return the column order that makes groups contiguous; None when they are already.

    `index` [in] is the group of each column; values below zero mean "not used".
    Raises: UnsupportedError when the groups are not equally wide.
    """
    import torch

    if index is None or bool((index < 0).all()):
        return None
    contiguous = torch.arange(index.numel(), device=index.device) // group
    if torch.equal(index, contiguous):
        return None
    perm = index.argsort(stable=True)
    if not torch.equal(index[perm], contiguous):
        raise UnsupportedError(f"{where}: g_idx does not give each group {group} columns")
    return perm


def check_shapes(where: str, values: Tensor, scales: Tensor, zeros: Tensor) -> None:
    """Raise UnsupportedError unless values [out, in], scales and zeros [groups, out] fit."""
    if scales.shape != zeros.shape or scales.shape[1] != values.shape[0]:
        raise UnsupportedError(
            f"{where}: {values.shape[0]} rows with scales {list(scales.shape)} and zeros"
            f" {list(zeros.shape)} do not belong together"
        )


def _int32() -> Any:
    import torch

    return torch.int32
