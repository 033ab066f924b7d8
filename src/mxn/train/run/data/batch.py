"""One micro-batch as tensors: rows of packed documents, what they are to predict, and where.

Knows no files and no model. Shape letters: R rows, T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that is not to be predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Shapes: all [R, T]. Attention never crosses from one segment to another."""

    ids: Tensor  # int64
    labels: Tensor  # int64: the token behind ids[t], or IGNORED; shifted already
    positions: Tensor  # int64: inside the document
    segments: Tensor  # int32: number of the document in its row
    num_tokens: int  # labels that count
    is_packed: bool = True  # whether any row holds more than one document

    @property
    def shape(self) -> tuple[int, int]:
        return self.ids.shape[0], self.ids.shape[1]

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return it on a device. Waits for the copies: who calls drops the host's tensors at once,
        and not every maker's runtime keeps their memory until it has read it.
        """
        return replace(
            self,
            ids=self.ids.to(device),
            labels=self.labels.to(device),
            positions=self.positions.to(device),
            segments=self.segments.to(device),
        )

    @classmethod
    def of_rows(cls, ids_RT: Tensor, labels_RT: Tensor | None = None) -> MicroBatch:
        """Return rows that are one document each; the labels are by default the next tokens."""
        if labels_RT is None:
            labels_RT = torch.full_like(ids_RT, IGNORED)
            labels_RT[:, :-1] = ids_RT[:, 1:]
        rows, length = ids_RT.shape
        return cls(
            ids=ids_RT,
            labels=labels_RT,
            positions=torch.arange(length, device=ids_RT.device).repeat(rows, 1),
            segments=torch.zeros_like(ids_RT, dtype=torch.int32),
            num_tokens=int((labels_RT != IGNORED).sum()),
            is_packed=False,
        )
