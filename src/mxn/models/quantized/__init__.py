"""Checkpoints that others quantized: GPTQ, AWQ, compressed-tensors and GGUF.

One reader per format returns the neutral `QuantizedMatrix`; nothing here computes with it. Start at
`find_format`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from mxn.errors import UnsupportedError

if TYPE_CHECKING:
    from mxn.models.checkpoint import Checkpoint
    from mxn.models.quantized.matrix import QuantizedMatrix


class Format(Protocol):
    """A way to store quantized weights, and what its config said."""

    @property
    def name(self) -> str: ...

    def holds(self, checkpoint: Checkpoint, module: str) -> bool:
        """Whether the weight of `module` is stored in this format."""
        ...

    def read(self, checkpoint: Checkpoint, module: str) -> QuantizedMatrix:
        """Return the weight of `module`, not dequantized. Raises: UnsupportedError."""
        ...


def find_format(config_json: dict[str, Any]) -> Format | None:
    """Return the format of a checkpoint's weights; None for plain and for FP8 ones.

    Raises: UnsupportedError when they are quantized in a way that mxn does not read. Such weights
    may have the shapes of plain ones, so that some would load and mean something else.
    """
    from mxn.models.quantized import awq, compressed, gguf_storage, gptq

    text = config_json.get("text_config") or {}
    for source in (config_json, text):
        found = source.get("quantization_config") or source.get("compression_config")
        if not found:
            continue
        found = _layout_of_auto_round(found)
        for reader in (gptq, awq, compressed, gguf_storage):
            form = reader.detect(found)
            if form is not None:
                return form
        _refuse_unless_fp8(found)
    return None


def _layout_of_auto_round(quantization: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the layout that AutoRound packed its weights in: GPTQ's or AWQ's.

    Source: the readers of vLLM and SGLang, which hand them to those two.
    """
    if quantization.get("quant_method") not in ("auto-round", "auto_round"):
        return quantization
    layout = quantization.get("packing_format", "auto_round:auto_gptq")
    if layout == "auto_round:auto_gptq":
        return quantization | {"quant_method": "gptq", "checkpoint_format": "gptq"}
    if layout == "auto_round:auto_awq":
        return quantization | {"quant_method": "awq", "version": "gemm", "zero_point": True}
    return quantization


def _refuse_unless_fp8(quantization: dict[str, Any]) -> None:
    method, form = quantization.get("quant_method", "unnamed"), quantization.get("fmt", "e4m3")
    if method != "fp8" or form != "e4m3":
        raise UnsupportedError(
            f"the weights are quantized ({method}{'' if method != 'fp8' else f', {form}'});"
            " mxn reads plain weights, fp8 (e4m3) with weight_scale_inv, gptq, awq,"
            " compressed-tensors (int) and GGUF",
            hint="serve the checkpoint it was made from",
        )
