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
    # What each device of a tensor-parallel stage has whole, of `params` and `activation_bytes`.
    whole_params: int = 0
    whole_bytes: float = 0.0
    is_output_whole: bool = False  # each of these devices has, keeps and sends all of the output

    @property
    def is_block(self) -> bool:
        """Whether it is one of the repeated layers: those alone are computed again."""
        return self.kind.startswith("block")

    def params_on(self, tp: int, held: float | None = None) -> float:
        """Return the parameters on one of `tp` devices; `held`: of the layer, default all."""
        return (
            self.whole_params + ((self.params if held is None else held) - self.whole_params) / tp
        )

    def kept_on(self, tp: int) -> float:
        """Return the activation bytes of a token on one of `tp` devices."""
        return self.whole_bytes + (self.activation_bytes - self.whole_bytes) / tp

    def output_on(self, tp: int) -> float:
        """Return the bytes of a token's output that one of `tp` devices has."""
        return self.output_bytes if self.is_output_whole else self.output_bytes / tp

    def flop_on(self, tp: int) -> float:
        """Return the forward work of a token on one of `tp` devices."""
        is_whole = 0 < self.params == self.whole_params
        return self.forward_flop if is_whole else self.forward_flop / tp


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
