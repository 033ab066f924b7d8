"""The smallest trainable parts: a matrix, which may carry a LoRA adapter, and a norm.

Modules stand in a tree whose paths are the names of the checkpoint, so that `named_parameters`
speaks the language of every other program. Knows no layers and no plans. Start at `Tree`.
Shape letters: D inputs and F outputs of a matrix, r rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from mxn.models.spec import DecoderSpec

M = TypeVar("M", bound=nn.Module)
Product = Callable[[Tensor, nn.Parameter, Tensor | None], Tensor]
"""x [..., D], W [F, D], b [F] or None -> x Wᵀ + b."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Make:
    """How parts are made: where, in which dtype, and which modules have a bias."""

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    biases: Collection[str] = frozenset()  # full names of the modules

    def parameter(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """Return a parameter without values: they come from a checkpoint or an initialisation."""
        return nn.Parameter(torch.empty(shape, dtype=dtype or self.dtype, device=self.device))


class Linear(nn.Module):
    """y = x Wᵀ (+ b) (+ scale · x Aᵀ Bᵀ)."""

    def __init__(self, make: Make, name: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.name = name
        self.weight = make.parameter(outputs, inputs)
        self.bias = make.parameter(outputs) if name in make.biases else None
        self.lora_A: Linear | None = None  # spelled as PEFT does
        self.lora_B: Linear | None = None
        self.lora_scale = 0.0
        self.product: Product = nn.functional.linear  # replaced where weight gradients are put off

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, self.weight, self.bias)
        if self.lora_A is None or self.lora_B is None:
            return y
        return y + self.lora_scale * self.lora_B(self.lora_A(x))


class Table(nn.Module):
    """Rows of an embedding."""

    def __init__(self, make: Make, rows: int, width: int) -> None:
        super().__init__()
        self.weight = make.parameter(rows, width)


class RmsNorm(nn.Module):
    """x / rms(x) · w over the last dim, in float32; w is stored minus one where `is_offset`.

    Source: Zhang & Sennrich 2019, eq. 4. Rounds as the reference implementations do: before the
    weight, except where that is an offset.
    """

    def __init__(self, make: Make, size: int, eps: float, *, is_offset: bool = False) -> None:
        super().__init__()
        self.weight = make.parameter(size)
        self.eps = eps
        self.is_offset = is_offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.is_offset:
            return (normed * (1.0 + self.weight.float())).to(x.dtype)
        return normed.to(x.dtype) * self.weight


class Tree:
    """The weights of one plan layer under their names in the checkpoint.

    `prefix` is what all full names of the layer begin with; `root` holds the rest as a path.
    """

    def __init__(self, root: nn.Module, prefix: str, model: DecoderSpec, make: Make) -> None:
        self.root, self.prefix, self.model, self.make = root, prefix, model, make

    def linear(self, path: str, inputs: int, outputs: int) -> Linear:
        return put(self.root, path, Linear(self.make, self.prefix + path, inputs, outputs))

    def norm(self, path: str, size: int, eps: float | None = None) -> RmsNorm:
        eps = self.model.norm_eps if eps is None else eps
        return put(
            self.root, path, RmsNorm(self.make, size, eps, is_offset=self.model.is_norm_offset)
        )

    def buffer(self, path: str, size: int) -> tuple[nn.Module, str]:
        """Add numbers that are not trained; return the module and the attribute they are in."""
        above, _, name = path.rpartition(".")
        owner = self.root.get_submodule(above)
        zeros = torch.zeros(size, dtype=torch.float32, device=self.make.device)
        owner.register_buffer(name, zeros)
        return owner, name


def put(root: nn.Module, path: str, module: M) -> M:
    """Hang `module` into the tree of `root` at a dotted path, making the nodes between."""
    *above, last = path.split(".")
    for step in above:
        child = root._modules.get(step)
        if child is None:
            child = nn.Module()
            root.add_module(step, child)
        root = child
    root.add_module(last, module)
    return module
