"""A prediction layer on native kernels: a decoder of one layer that also reads hidden rows.

Knows weights and rows; knows nothing of guesses. Start at `NativePrediction.predict`.
Source: arXiv 2412.19437, section 2.2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mxn.models.native.decoder import NativeDecoder

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.kernels.batch import StepBatch
    from mxn.models.base import LayerCache
    from mxn.models.weights import MtpWeights


class NativePrediction(NativeDecoder):
    """Guesses the token after the next one; shares embedding, threads and memory with its model."""

    def __init__(self, model: NativeDecoder, weights: MtpWeights) -> None:
        self._weights = weights
        self._embedding = model.parts.head
        parts = replace(
            model.parts, layers=[weights.layer], final_norm=weights.final_norm, mtp=[],
            head=model.parts.head if weights.head is None else weights.head,
        )  # fmt: skip
        spec = replace(model.spec, layers=model.spec.layers[-1:])
        super().__init__(spec, parts, num_threads=model.num_threads)

    def _build(self) -> None:
        super()._build()
        native, weights = self._native, self._weights
        if self.parts.table_VD is None:  # tied: the rows of the model's head, not of the layer's
            native.embedding = self._embedding.handle
        native.is_prediction = True
        native.merge = weights.merge.handle
        native.token_norm = weights.token_norm.data_ptr()
        native.hidden_norm = weights.hidden_norm.data_ptr()

    def predict(
        self, hidden_TD: Tensor, batch: StepBatch, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """Return logits [R, V] of the rows that `batch` wants, and the layer's output [T, D].

        `hidden_TD` float32 is the model's output behind its final norm, or this layer's.
        """
        hidden_TD = hidden_TD.contiguous()
        out_TD = self._hidden(hidden_TD.shape[0])
        return self._run(batch, [cache], hidden_TD.data_ptr(), out_TD.data_ptr()), out_TD
