"""Backward passes in two halves: gradients of the inputs now, those of the matrices later.

Zero-bubble schedules fill waiting time with the second half. Only products with a matrix are put
off; norms, biases and embeddings are done with the first half, they cost next to nothing. Nothing
is computed twice: the halves together do what one backward pass does. Start at `DeferredWeights`.
Source: Qi et al. 2023 (2401.10241).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mxn.train.run.net.parts import Linear

Add = Callable[[nn.Parameter, Tensor, Tensor], None]
"""Add gᵀ x to the gradient of a weight: parameter, g [S, F], x [S, D]."""


class _Owed(NamedTuple):
    weight: nn.Parameter
    gradient_SF: Tensor
    input_SD: Tensor


class DeferredWeights:
    """The products that a stage owes. Between `put_off` and `pay` their inputs stay in memory."""

    def __init__(self, stage: nn.Module, add: Add) -> None:
        self._add = add
        self._open: list[_Owed] | None = None
        for module in stage.modules():
            if isinstance(module, Linear):
                module.product = self._product

    @contextmanager
    def put_off(self) -> Iterator[list[_Owed]]:
        """Collect what backward passes inside owe, instead of computing it."""
        self._open = []
        try:
            yield self._open
        finally:
            self._open = None

    def pay(self, owed: list[_Owed]) -> None:
        """Compute what is owed, and empty the list as it goes."""
        with torch.no_grad():
            while owed:
                self._add(*owed.pop())

    def _product(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return nn.functional.linear(x, weight, bias)
        return _Product.apply(x, weight, bias, self)

    def _owe(self, weight: nn.Parameter, gradient: Tensor, x: Tensor) -> bool:
        if self._open is None:
            return False
        self._open.append(_Owed(weight, gradient.flatten(0, -2), x.flatten(0, -2)))
        return True


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b, whose weight gradient can wait."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None, owner: DeferredWeights
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.owner = weight, owner
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight, (gradient,) = ctx.saved_tensors, ctx.weight, gradients
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        of_x = gradient @ weight if to_x else None
        of_bias = gradient.flatten(0, -2).sum(0) if to_bias else None
        of_weight = None
        if to_weight and not ctx.owner._owe(weight, gradient, x):
            of_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        return of_x, of_weight, of_bias, None
