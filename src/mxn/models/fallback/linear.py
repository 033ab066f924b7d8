"""Swaps the plain linear layers of a transformers model for the linear kernel of the ops."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.kernels.registry import Ops


class KernelLinear(nn.Module):
    """Does what an `nn.Linear` does, through a prepared kernel.

    `weight` is an empty tensor with the dtype and device of the real one: model code may ask for
    these. Layers whose weight is used as a matrix are not swapped (`reads_weight`); should one slip
    through, its code fails on the shape and the load-time check refuses the model.
    """

    def __init__(self, linear: nn.Linear, ops: Ops) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight.new_empty(0)
        self._kernel = ops.prepare_linear(
            linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._kernel(x)


def swap_linears(model: nn.Module, ops: Ops) -> int:
    """Replace every plain `nn.Linear` that has the dtype of the ops; return how many.

    Subclasses, layers kept in another dtype on purpose, and layers whose weight other code reads
    stay as they are.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
        and child.weight.dtype == ops.dtype
        and not reads_weight(type(parent), name)
    ]
    swapped: dict[int, KernelLinear] = {}  # a layer used in two places is prepared once
    for parent, name, child in found:
        if id(child) not in swapped:
            swapped[id(child)] = KernelLinear(child, ops)
        setattr(parent, name, swapped[id(child)])
    return len(swapped)


@cache
def reads_weight(parent: type, name: str) -> bool:
    """Does the code of class `parent` use the weight of its layer `name` as a tensor of its own?"""
    try:
        source = inspect.getsource(parent)
    except (OSError, TypeError):  # a class made at run time has no source to look at
        return False
    return bool(re.search(rf"self\.{re.escape(name)}\.weight\b(?!\.(dtype|device)\b)", source))
