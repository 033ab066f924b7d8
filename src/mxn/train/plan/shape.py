"""A model as the planner sees it: a row of layers with sizes and work, no tensors.

Layers are counted from the embedding (0) to the head (last). Layers of one kind have the same
size, so each kind is profiled once. Start at `ModelShape`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One layer. Work and bytes are per token of the shape's sequence length, on one device."""

    kind: str  # "embedding", "block", "block.moe", "head"
    params: int
    forward_flop: float  # of all products of the forward pass, attention over the context included
    activation_bytes: float  # kept until backward when nothing is recomputed
    output_bytes: float  # of what goes to the next layer
    # Of `activation_bytes`, what selective recomputation makes anew; None: unknown, see `memory`.
    core_bytes: float | None = None
    active_params: int | None = None  # used per token, where experts make it fewer than `params`
    routed_to: int = 1  # experts that a token is sent to, where there are some

    @property
    def is_block(self) -> bool:
        """Whether it is one of the repeated layers: those alone are computed again."""
        return self.kind.startswith("block")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    name: str
    layers: tuple[LayerShape, ...]
    seq_tokens: int
    is_tied: bool = False  # the head's matrix is the embedding's: stages that hold them share grads

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def params(self) -> int:
        """All weights, a tied matrix counted once."""
        total = sum(layer.params for layer in self.layers)
        return total - (self.layers[0].params if self.is_tied else 0)

    @property
    def flop_per_token(self) -> float:
        """Forward and backward: three times the forward products."""
        return 3 * sum(layer.forward_flop for layer in self.layers)
