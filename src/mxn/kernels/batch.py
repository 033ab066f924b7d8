"""What a kernel may know of a step: which cache pages each sequence owns and which tokens are new.

Shape letters, used throughout `kernels/` and `models/`:
T tokens of the step (all sequences flattened), S sequences, P pages of the longest sequence,
K tokens in a page, D hidden size, N query heads, G key/value heads, H head dim, J value head dim,
F feed-forward size, E experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the keys and values of each sequence lie, and which rows of T belong to it.

    Sequence s owns rows ``query_starts[s]:query_starts[s + 1]`` of the step. Its new tokens are the
    last of its context: the first new token of s stands at position
    ``context_lens[s] - (query_starts[s + 1] - query_starts[s])``.

    The lists are on the host so that a kernel never has to wait for the device to learn a shape;
    the tensors hold the same facts on the device.
    """

    query_starts: list[int]  # S + 1
    context_lens: list[int]  # S, tokens in the cache after this step's tokens are written
    page_table_SP: Tensor  # int64, padded with 0
    context_lens_S: Tensor  # int64
    query_starts_S1: Tensor  # int64, S + 1
    slots_T: Tensor  # int64, page * page_tokens + offset: where each new token is written
    page_tokens: int
    # First slot of each sequence whose pages lie one behind the other, else -1; None: unknown.
    run_starts: list[int] | None = None
    # What kernels computed from this batch and every layer needs again: masks, gather indices.
    derived: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_sequences(self) -> int:
        return len(self.context_lens)

    @property
    def is_decode(self) -> bool:
        """Every sequence has exactly one new token."""
        return self.query_starts[-1] == len(self.context_lens)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step of a decoder: the new tokens of all sequences, flattened."""

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64
    attention: AttentionBatch
    logits_rows_R: Tensor | None  # int64 rows of T whose logits are wanted; None = all
