"""Optimizer state held once per job instead of once per pipeline (ZeRO stage 1), by whole layers.

The ranks that hold a layer take turns in owning one: the owner keeps its state, updates it and
gives the new weights to the others. The same ranks own what they write to a checkpoint, so a layer
is always complete in one place. The matrix that embedding and head share is not divided: each
holder updates its copy. Source: Rajbhandari et al. 2020 (1910.02054), there by even pieces; whole
layers fit pipelines that are cut differently. Start at `ShardedAdamW`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mxn.errors import UserError
from mxn.train.run.net import StageModule
from mxn.train.run.optim import AdamSettings, AdamW, Key


def owner_of(holders: Mapping[int, list[int]], layer: int) -> int:
    """Return the rank that owns a layer among those that hold it."""
    return holders[layer][layer % len(holders[layer])]


class ShardedAdamW(AdamW):
    """AdamW of the layers that this rank owns; of the others it knows the weights only."""

    def __init__(
        self,
        stage: StageModule,
        settings: AdamSettings,
        *,
        rank: int,
        holders: Mapping[int, list[int]],
        undivided: Collection[Key],
    ) -> None:
        """`undivided`: parameters that every holder updates."""

        def owns(key: Key) -> bool:
            return key in undivided or owner_of(holders, key[0]) == rank

        super().__init__(stage, settings, owns=owns)

    @torch.no_grad()
    def load_layer_state(self, layer: int, state: Mapping[str, Tensor]) -> None:
        """Copy the whole state of an owned layer; of another one the weights.

        Raises: UserError for other names or shapes.
        """
        own = self.layer_state(layer)
        super().load_layer_state(layer, {name: state[name] for name in own if name in state})
        state = self._stage.part_of(layer, state)
        for name, parameter in self._stage.layer_parameters(layer).items():
            if not parameter.requires_grad or f"{name}.master" in own:
                continue
            master = state.get(f"{name}.master")
            if master is None or master.shape != parameter.shape:
                raise UserError(f"the optimizer state for layer {layer} does not fit {name!r}")
            parameter.copy_(master)
