"""Matrices cut over the ranks of a team (tensor parallelism), and the sums that join their results.

Attention is cut by heads and an MLP by its inner width: of the matrices that lead in, a rank holds
rows of the output; of those that lead out, columns of the input. Between, no rank needs another;
`leave` adds the parts in the forward pass and `enter` adds the gradients in the backward pass, once
each. What is not cut is computed by all ranks alike, bit for bit, as both sums give all the same
bits. Knows no process groups: those come as a `Team`. Start at `Cut`.
Source: Shoeybi et al. 2019 (1909.08053), section 3, there f and g.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mxn.errors import UnsupportedError


class Team(Protocol):
    """The ranks that hold the same layers together, as one of them sees it."""

    @property
    def size(self) -> int: ...

    @property
    def index(self) -> int:
        """The number of this rank, from 0."""
        ...

    def add(self, tensor: Tensor) -> None:
        """Sum a contiguous tensor over the team, in place."""
        ...

    def gather(self, part: Tensor) -> list[Tensor]:
        """Return the parts of all, by index; equally large on each."""
        ...


@dataclass(frozen=True, slots=True)
class Cut:
    """How a tensor is divided: `widths` are what one rank has, along `dim`, of each section.

    A tensor of several sections is one that is stored fused, such as gate and up: each is divided.
    """

    dim: int
    widths: tuple[int, ...]

    def part(self, whole: Tensor, index: int, size: int) -> Tensor:
        """Return what rank `index` of `size` holds of the whole tensor. Raises: UserError."""
        sections = whole.split([width * size for width in self.widths], dim=self.dim)
        return torch.cat(
            [
                section.narrow(self.dim, index * width, width)
                for section, width in zip(sections, self.widths, strict=True)
            ],
            dim=self.dim,
        )

    def put(self, whole: Tensor, part: Tensor, index: int, size: int) -> None:
        """Copy the part of rank `index` of `size` to its places in the whole tensor."""
        begin = at = 0
        for width in self.widths:
            place = whole.narrow(self.dim, begin + index * width, width)
            place.copy_(part.narrow(self.dim, at, width))
            begin, at = begin + width * size, at + width

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the tensor that these parts, by index, are of."""
        pieces = [part.split(self.widths, dim=self.dim) for part in parts]
        sections = [section for of_section in zip(*pieces, strict=True) for section in of_section]
        return torch.cat(sections, dim=self.dim)

    def whole_shape(self, part: torch.Size, size: int) -> tuple[int, ...]:
        return tuple(n * size if at == self.dim else n for at, n in enumerate(part))


Cuts = Mapping[str, Cut]
"""By full name of a parameter; those that are whole on every rank are not in it."""


def cut_of(cuts: Cuts, name: str) -> Cut | None:
    """Return the cut of a parameter or of its optimizer state, ``<parameter>.exp_avg``."""
    return cuts.get(name) or cuts.get(name.rpartition(".")[0])


def share_of(number: int, team: Team | None, what: str) -> int:
    """Return the part of `number` that a rank holds. Raises: UnsupportedError when it has a rest"""
    if team is None:
        return number
    if number % team.size:
        raise UnsupportedError(
            f"{number} {what} cannot be divided by tensor parallelism of {team.size}",
            hint=f"choose a tp that divides {number}, or tp = 1",
        )
    return number // team.size


def enter(x: Tensor, team: Team | None) -> Tensor:
    """Return `x`, which all ranks have, for what each does a part of: its gradient is a sum."""
    return x if team is None else _Enter.apply(x, team)


def leave(part: Tensor, team: Team | None) -> Tensor:
    """Return the sum of the parts; all ranks go on with it alike."""
    return part if team is None else _Leave.apply(part, team)


def divide(x: Tensor, team: Team | None) -> Tensor:
    """Return `x` for what all ranks do alike behind `enter`: their gradients count once in all."""
    return x if team is None else _Divide.apply(x, team.size)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        ctx.team.add(total)
        return total, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, team: Team) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        team.add(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Divide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.size, None
