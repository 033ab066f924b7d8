"""The sum of token losses from hidden states, without the logits of all rows at once.

Shape letters: S tokens in a line, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mxn.train.run.data.batch import IGNORED

# Logits of a piece, in float32. Below it they are kept for the backward pass; a larger batch goes
# through in pieces of this size, whose logits are computed again there.
PIECE_BYTES = 64 * 2**20

Logits = Callable[[Tensor], Tensor]
"""[S, D] -> [S, V], float32."""


def sum_of_losses(
    hidden_SD: Tensor, labels_S: Tensor, logits: Logits, *, vocab_size: int, num_tokens: int
) -> Tensor:
    """Return the sum of cross entropies in nats, float32, over the labels that count.

    `num_tokens`: how many labels count; rows of the others are not projected.
    """
    if num_tokens < len(labels_S):
        # The rows that count, in their order; a sort, because counting them would ask the device.
        rows = (labels_S == IGNORED).to(torch.int8).argsort(stable=True)[:num_tokens]
        hidden_SD, labels_S = hidden_SD[rows], labels_S[rows]
    piece = max(1, PIECE_BYTES // (4 * vocab_size))
    if len(labels_S) <= piece or not torch.is_grad_enabled():
        pieces = zip(hidden_SD.split(piece), labels_S.split(piece), strict=True)
        return _total([_piece(h, labels, logits) for h, labels in pieces], hidden_SD)
    return _total(
        [
            checkpoint(_piece, h, labels, logits, use_reentrant=False)
            for h, labels in zip(hidden_SD.split(piece), labels_S.split(piece), strict=True)
        ],
        hidden_SD,
    )


def _piece(hidden_SD: Tensor, labels_S: Tensor, logits: Logits) -> Tensor:
    return nn.functional.cross_entropy(logits(hidden_SD), labels_S, reduction="sum")


def _total(sums: list[Tensor], hidden_SD: Tensor) -> Tensor:
    """Return the sum of the pieces; with none, a zero that still has a gradient."""
    return torch.stack(sums).sum() if sums else hidden_SD.float().sum() * 0.0
