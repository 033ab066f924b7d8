"""A transformers model as a `CausalLM`: flattened tokens in, paged cache, logits out."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from mxn.models.fallback.attention import PAGED, Step, register, running

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.kernels.batch import StepBatch
    from mxn.kernels.registry import Ops
    from mxn.models.base import LayerCache
    from mxn.models.fallback.probe import AttentionCall


class FallbackDecoder:
    """Drives the code of transformers one step at a time. Implements `CausalLM`."""

    def __init__(
        self,
        model: Any,
        calls: tuple[AttentionCall, ...],
        ops: Ops,
        *,
        max_positions: int,
        position_offset: int = 0,
    ) -> None:
        register()
        model.set_attn_implementation(PAGED)
        self.model = model
        self.ops = ops
        self.calls = calls
        self.kv_shapes = tuple(call.kv_shape for call in calls)
        self.vocab_size = model.config.get_text_config(decoder=True).vocab_size
        self.max_positions = max_positions
        self.dtype = ops.dtype
        self.device = ops.device
        self._position_offset = position_offset
        self.selects_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, batch: StepBatch, cache: list[LayerCache]) -> Tensor:
        """Write the step's keys and values into `cache` and return logits [R, V], float32."""
        rows_R = batch.logits_rows_R
        options: dict[str, Any] = {}
        if rows_R is not None and self.selects_rows:
            options["logits_to_keep"] = rows_R
        step = Step(self.ops, batch.attention, cache, self.calls)
        with torch.inference_mode(), running(step):
            output = self.model(
                input_ids=batch.token_ids_T[None],
                position_ids=(batch.positions_T + self._position_offset)[None],
                use_cache=False,
                **options,
            )
        logits_RV = output.logits[0]
        if rows_R is not None and not self.selects_rows:
            logits_RV = logits_RV[rows_R]
        return logits_RV.float()
