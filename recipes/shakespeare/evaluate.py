"""Perplexity by one written rule, for any callable that maps ids [1, T] to logits.

Rule: windows of `context` tokens that overlap by half; a token is scored once, with at least half
a window before it (except at the start of the text); the first token of the text is not scored;
no start token. Baselines score the same tokens (recipes/baselines.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model predicts a text of `num_tokens` scored tokens and `num_bytes` bytes."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.num_tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes

    def as_dict(self) -> dict[str, float]:
        return {
            "perplexity_per_token": round(self.perplexity, 3),
            "bits_per_byte": round(self.bits_per_byte, 4),
        }


@torch.no_grad()
def total_nats(logits_of: Callable[[Tensor], Tensor], ids: Tensor, context: int) -> float:
    """Return the negative log-likelihood of `ids` [tokens] without its first token."""
    stride, total, scored_to = context // 2, 0.0, 1
    for start in range(0, max(1, len(ids) - 1), stride):
        window = ids[start : start + context + 1]
        logits = logits_of(window[None, :-1]).float()[0]
        first = scored_to - start  # index in `window` of the first token not scored yet
        total += float(F.cross_entropy(logits[first - 1 :], window[first:], reduction="sum"))
        scored_to = start + len(window)
        if scored_to >= len(ids):
            break
    return total


def nats_per_token(network: torch.nn.Module, ids: Tensor, context: int) -> float:
    """Return the mean loss of a network under training, which is left in training mode."""
    network.eval()
    nats = total_nats(network, ids, context) / (len(ids) - 1)
    network.train()
    return nats
