"""What an op is told beside tensors. Models describe themselves with these; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """How a token picks its experts."""

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = False  # the chosen weights sum to one
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"


class ChoiceRule(NamedTuple):
    """How the token of one row is chosen; the filters apply in this order, then the draw."""

    temperature: float = 0.0  # 0: the largest logit, and nothing else counts
    uniform: float = 0.0  # random, in [0, 1)
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off

    @property
    def has_filter(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class LogitEdit(NamedTuple):
    """What becomes of some logits of one row before its token is chosen; see the op `penalize`."""

    row: int
    ids: np.ndarray  # int64 [M], each token once
    repetition: float  # a positive logit is divided by it, another multiplied
    subtract: np.ndarray  # float32 [M]
