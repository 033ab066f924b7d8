"""The smallest trainable parts: a matrix, which may carry a LoRA adapter, and a norm.

Modules stand in a tree whose paths are the names of the checkpoint, so that `named_parameters`
speaks the language of every other program. Knows no layers and no plans. Under tensor parallelism
a part holds what its rank has of it, and says how that is cut. Start at `Tree`.
Shape letters: D inputs and F outputs of a matrix, r rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mxn.errors import UnsupportedError
from mxn.models.spec import DecoderSpec
from mxn.train.run.net.shard import Cut, Team, divide, enter, leave

M = TypeVar("M", bound=nn.Module)
Product = Callable[[Tensor, nn.Parameter, Tensor | None], Tensor]
"""x [..., D], W [F, D], b [F] or None -> x Wᵀ + b."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Make:
    """How parts are made: where, in which dtype, which modules have a bias, for which team."""

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    biases: Collection[str] = frozenset()  # full names of the modules
    team: Team | None = None  # None: whole

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
        self.team: Team | None = None  # where `cuts` says that this is a part of a matrix
        self.cuts: dict[str, Cut] = {}  # by name of the parameter
        self.product: Product = nn.functional.linear  # replaced where weight gradients are put off

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        y = self._multiply(x)
        if self.lora_A is None or self.lora_B is None:
            return y
        return y + self.lora_scale * self._adapt(x, self.lora_A, self.lora_B)

    def _multiply(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)

    def _adapt(self, x: Tensor, down: Linear, up: Linear) -> Tensor:
        # Of a matrix cut by its outputs, A is whole on every rank and B is cut as the matrix is.
        return up(enter(down(divide(x, self.team)), self.team))


class LinearOut(Linear):
    """A matrix that leads out: cut by its inputs, so that y is the sum of what the ranks have.

    `is_summed` False: the caller adds the parts, and there is no bias.
    """

    is_summed = True

    def _multiply(self, x: Tensor) -> Tensor:
        y = self.product(x, self.weight, None)
        if self.is_summed:
            y = leave(y, self.team)
        return y if self.bias is None else y + self.bias

    def _adapt(self, x: Tensor, down: Linear, up: Linear) -> Tensor:
        return up(leave(down(x), self.team))


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
        self.team: Team | None = None
        self.cuts: dict[str, Cut] = {}

    def forward(self, x: Tensor) -> Tensor:
        # Whole on every rank, but used for the heads of one: its gradient is a sum.
        weight = self.weight if self.cuts else enter(self.weight, self.team)
        if self.team is None or not self.cuts:
            return _Norm.apply(x, weight, self.eps, self.is_offset)
        wide = x.float()
        normed = wide * torch.rsqrt(self._mean_square(wide, self.team) + self.eps)
        return _weighted(normed, weight, x.dtype, self.is_offset)

    def _mean_square(self, wide: Tensor, team: Team) -> Tensor:
        total = leave(wide.square().sum(-1, keepdim=True), team)
        return enter(total, team) / (wide.shape[-1] * team.size)


class _Norm(torch.autograd.Function):
    """Keeps its input and the reciprocal of its rms; autograd would keep the input in float32 and
    what is normed besides, three times as much where values have 16 bits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, is_offset: bool) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, inverse, weight)
        ctx.is_offset = is_offset
        return _weighted(wide * inverse, weight, x.dtype, is_offset)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, inverse, weight = ctx.saved_tensors
        (gradient,), normed = gradients, x.float() * inverse
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            if ctx.is_offset:
                inner = gradient.float() * (1.0 + weight.float())
            else:
                inner = (gradient * weight).float()
            along = (inner * normed).mean(-1, keepdim=True)
            of_x = (inverse * (inner - normed * along)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            if ctx.is_offset:
                each = gradient.float() * normed
            else:
                each = (gradient * normed.to(x.dtype)).float()
            of_weight = each.flatten(0, -2).sum(0).to(weight.dtype)
        return of_x, of_weight, None, None


def _weighted(normed: Tensor, weight: Tensor, dtype: torch.dtype, is_offset: bool) -> Tensor:
    if is_offset:
        return (normed * (1.0 + weight.float())).to(dtype)
    return normed.to(dtype) * weight


class Tree:
    """The weights of one plan layer under their names in the checkpoint.

    `prefix` is what all full names of the layer begin with; `root` holds the rest as a path.
    """

    def __init__(self, root: nn.Module, prefix: str, model: DecoderSpec, make: Make) -> None:
        self.root, self.prefix, self.model, self.make = root, prefix, model, make

    def linear(self, path: str, inputs: int, outputs: int) -> Linear:
        return put(self.root, path, Linear(self.make, self.prefix + path, inputs, outputs))

    def linear_in(self, path: str, inputs: int, *widths: int) -> Linear:
        """Add a matrix that leads in. `widths`: outputs of each of its sections, of this rank."""
        linear = self.linear(path, inputs, sum(widths))
        linear.team = self.make.team
        if linear.team is not None:
            cut = Cut(0, widths)
            linear.cuts = {"weight": cut} | ({} if linear.bias is None else {"bias": cut})
        return linear

    def linear_out(self, path: str, width: int, outputs: int, *, is_summed: bool = True) -> Linear:
        """Add a matrix that leads out. `width`: its inputs, of this rank.

        Raises: UnsupportedError for a bias that would be added by each rank.
        """
        linear = LinearOut(self.make, self.prefix + path, width, outputs)
        linear.team, linear.is_summed = self.make.team, is_summed
        if linear.team is not None:
            linear.cuts = {"weight": Cut(1, (width,))}
            if not is_summed and linear.bias is not None:
                raise UnsupportedError(
                    f"{linear.name} has a bias, which tensor parallelism of experts cannot add",
                    hint="tp = 1",
                )
        return put(self.root, path, linear)

    def norm_of_heads(self, path: str, size: int, *, is_cut: bool) -> RmsNorm:
        """Add a norm of what one rank has; `is_cut`: over all heads together, of which it has some.

        `size`: of the weight, on this rank.
        """
        norm = self.norm(path, size)
        norm.team = self.make.team
        if norm.team is not None and is_cut:
            norm.cuts = {"weight": Cut(0, (size,))}
        return norm

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
