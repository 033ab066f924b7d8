"""AWQ checkpoints in the GEMM layout (AutoAWQ): `qweight`, `qzeros`, `scales`.

Layout of a module of `in` columns and `out` rows: qweight int32 [in, out / 8], where nibble i of
word w is row ``8 * w + AWQ_ORDER[i]``; qzeros [groups, out / 8] likewise; scales [groups, out].
Zeros are stored as they are. Source: AutoAWQ's packer. Start at `AwqFormat.read`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mxn.errors import UnsupportedError
from mxn.models.quantized.gptq import check_shapes, group_size
from mxn.models.quantized.matrix import QuantizedMatrix
from mxn.models.quantized.packing import unpack_awq

if TYPE_CHECKING:
    from mxn.models.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqFormat:
    """4 bit, asymmetric, one scale and zero per group of columns."""

    name = "awq"

    def holds(self, checkpoint: Checkpoint, module: str) -> bool:
        return checkpoint.is_stored(f"{module}.qweight")

    def read(self, checkpoint: Checkpoint, module: str) -> QuantizedMatrix:
        """Return the weight of `module`.

        Raises: NotFoundError for a missing tensor; UnsupportedError when shapes do not fit.
        """
        words, zero_words, scales = (
            checkpoint.raw(f"{module}.{part}") for part in ("qweight", "qzeros", "scales")
        )
        where = f"{module} of {checkpoint.directory}"
        group = group_size(where, words.shape[0], scales.shape[0])
        values, zeros = unpack_awq(words).t().contiguous(), unpack_awq(zero_words)
        check_shapes(where, values, scales, zeros)
        return QuantizedMatrix(
            values=values,
            bits=4,
            group=group,
            scales=scales.t().float().contiguous(),
            zeros=zeros.t().contiguous(),
        )


def detect(quantization: dict[str, Any]) -> AwqFormat | None:
    """Return the format that a `quantization_config` describes; None if it is not AWQ.

    Raises: UnsupportedError for a variant of AWQ that is not read.
    """
    if quantization.get("quant_method") != "awq":
        return None
    bits = quantization.get("bits", quantization.get("w_bit"))
    layout = str(quantization.get("version") or quantization.get("format") or "gemm").lower()
    if bits != 4 or layout != "gemm" or not quantization.get("zero_point", True):
        raise UnsupportedError(
            f"the weights are quantized (awq) with bits={bits!r}, version={layout!r},"
            f" zero_point={quantization.get('zero_point', True)!r};"
            " read are 4 bits, version gemm, zero_point true",
            hint="quantize it again with version GEMM, or serve the checkpoint it was made from",
        )
    return AwqFormat()
