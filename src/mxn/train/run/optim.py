"""Sums of gradients and AdamW for the layers of one stage, in float32 whatever computes.

State is kept and given out by plan layer and parameter name, so that it can move to another plan.
Knows no other ranks: who sums over pipelines does it between `GradientSums` and `AdamW.step`.
Start at `AdamW`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mxn.errors import ConfigError, UserError
from mxn.train.run.net import StageModule

PIECE_VALUES = 1 << 22
"""Of a parameter that are updated at once. An update takes two float32 values beside each, which
for a whole embedding would be memory that no plan knows of."""

Key = tuple[int, str]
"""Plan layer and full name of a parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamSettings:
    """Source: Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; norms and biases have none

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} must be 0 to below 1, got {getattr(self, name)!r}")
        if self.eps <= 0 or self.weight_decay < 0:
            raise ConfigError(
                f"eps must be above 0 and weight_decay at least 0, got {self.eps!r} and"
                f" {self.weight_decay!r}"
            )


def trainable(stage: StageModule) -> dict[Key, nn.Parameter]:
    """Return what a stage trains, in plan order.

    A matrix that embedding and head of this stage share appears once, under the embedding.
    """
    found: dict[Key, nn.Parameter] = {}
    seen: set[int] = set()
    for layer in range(stage.first, stage.end):
        for name, parameter in stage.layer_parameters(layer).items():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found[layer, name] = parameter
    return found


class GradientSums:
    """The gradients of a stage, summed over the micro-batches of a step in float32.

    With float32 parameters they are ``parameter.grad``. Others give theirs away after each
    backward pass, because sums of many in bfloat16 lose what the later ones add.
    """

    def __init__(self, stage: StageModule) -> None:
        self._parameters = trainable(stage)
        self._sums: dict[Key, Tensor] = {}
        for key, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(self._taker(key))

    def __iter__(self) -> Iterator[Key]:
        return iter(self._parameters)

    def __getitem__(self, key: Key) -> Tensor:
        """Return the sum so far, to be read or changed in place; zeros where nothing came."""
        parameter = self._parameters[key]
        if parameter.dtype == torch.float32:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            return parameter.grad
        if key not in self._sums:
            self._sums[key] = torch.zeros_like(parameter, dtype=torch.float32)
        return self._sums[key]

    def place(self, key: Key, memory: Tensor) -> None:
        """Keep a sum in `memory`, float32 of the parameter's shape, from now on; it is cleared."""
        memory.zero_()
        if self._parameters[key].dtype == torch.float32:
            self._parameters[key].grad = memory
        else:
            self._sums[key] = memory

    def parameter(self, key: Key) -> nn.Parameter:
        return self._parameters[key]

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Return the sums of one plan layer by name."""
        return {key[1]: self[key] for key in self if key[0] == layer}

    def square_norm(self, keys: Callable[[Key], bool] = lambda key: True) -> Tensor:
        """Return the sum of all squares as a float64 scalar on the host.

        `keys` chooses the ones this rank answers for: those held twice count once.
        """
        squares = [torch.linalg.vector_norm(self[key]).square() for key in self if keys(key)]
        if not squares:
            return torch.zeros((), dtype=torch.float64)
        return torch.stack(squares).cpu().double().sum()

    def clear(self) -> None:
        """Forget all sums; the memory is kept for the next step."""
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                parameter.grad.zero_()
        for total in self._sums.values():
            total.zero_()

    def _taker(self, key: Key) -> Callable[[Tensor], None]:
        known = weakref.ref(self)  # a hook that held it would keep the parameter alive for good

        def take(parameter: Tensor) -> None:
            sums = known()
            if sums is not None and parameter.grad is not None:
                sums[key].add_(parameter.grad)
                parameter.grad = None

        return take


class _Slot(NamedTuple):
    parameter: nn.Parameter
    master: Tensor  # float32; the parameter itself where that is float32
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight_decay: float

    def state(self) -> dict[str, Tensor]:
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


class AdamW:
    """AdamW with decoupled weight decay on float32 master weights."""

    def __init__(
        self,
        stage: StageModule,
        settings: AdamSettings,
        *,
        owns: Callable[[Key], bool] = lambda key: True,
    ) -> None:
        """`owns` chooses the parameters updated here; the others are updated elsewhere (ZeRO-1)."""
        self.settings = settings
        self.num_steps = 0
        self._slots: dict[Key, _Slot] = {}
        self._stage = stage
        for key, parameter in trainable(stage).items():
            if owns(key):
                self._slots[key] = _slot(parameter, settings)

    @torch.no_grad()
    def step(self, gradients: GradientSums, learning_rate: float, *, scale: float = 1.0) -> None:
        """Update once with ``gradients · scale``: scale is clipping / tokens of the whole batch."""
        self.num_steps += 1
        for key, slot in self._slots.items():
            decay = 1 - learning_rate * slot.weight_decay
            for piece in _pieces(gradients[key], slot.master, slot.exp_avg, slot.exp_avg_sq):
                self._update(*piece, scale=scale, learning_rate=learning_rate, decay=decay)
            if slot.master.dtype != slot.parameter.dtype:  # else it is the parameter's own memory
                slot.parameter.data.copy_(slot.master)

    def _update(
        self, gradient: Tensor, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
        *, scale: float, learning_rate: float, decay: float,
    ) -> None:  # fmt: skip
        settings = self.settings
        first = 1 - settings.beta1**self.num_steps
        second = math.sqrt(1 - settings.beta2**self.num_steps)
        gradient = gradient * scale
        exp_avg.lerp_(gradient, 1 - settings.beta1)
        exp_avg_sq.mul_(settings.beta2).addcmul_(gradient, gradient, value=1 - settings.beta2)
        if decay != 1:
            master.mul_(decay)
        spread = exp_avg_sq.sqrt().div_(second).add_(settings.eps)
        master.addcdiv_(exp_avg, spread, value=-learning_rate / first)

    def layer_state(self, layer: int) -> dict[str, Tensor]:
        """Return ``<name>.exp_avg``, ``.exp_avg_sq`` and ``.master`` of a layer, not copied.

        A matrix shared within this stage is also given as the head's own, as another plan needs it.
        """
        return {
            f"{name}.{part}": tensor
            for name, slot in self._of_layer(layer)
            for part, tensor in slot.state().items()
        }

    @torch.no_grad()
    def load_layer_state(self, layer: int, state: Mapping[str, Tensor]) -> None:
        """Copy state into a layer, and the master weights into its parameters.

        `num_steps` is the caller's to set. `state` is of whole tensors also where the stage holds
        parts. Raises: UserError for other names or shapes.
        """
        state = self._stage.part_of(layer, state)
        own = self.layer_state(layer)
        odd = sorted(own.keys() ^ state.keys())
        if odd:
            raise UserError(
                f"the optimizer state for layer {layer} does not fit this model: {odd[:3]}"
                f" {'missing' if odd[0] in own else 'unknown'}"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise UserError(
                    f"{name} of layer {layer} is {tuple(state[name].shape)} in the optimizer"
                    f" state, the model's is {tuple(tensor.shape)}"
                )
            tensor.copy_(state[name])
        for _, slot in self._of_layer(layer):
            slot.parameter.data.copy_(slot.master)

    def master(self, key: Key) -> Tensor | None:
        """Return a parameter's float32 weights, not copied; None if it is updated elsewhere."""
        slot = self._slots.get(key)
        return None if slot is None else slot.master

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return master and moments of one parameter, not copied; empty if it has none here."""
        own = (slot for slot in self._slots.values() if slot.parameter is parameter)
        return next((slot.state() for slot in own), {})

    @torch.no_grad()
    def round_weights(self) -> None:
        """Give the master weights to the parameters, behind a change of the former."""
        for slot in self._slots.values():
            if slot.master.dtype != slot.parameter.dtype:
                slot.parameter.data.copy_(slot.master)

    def whole_layer_state(self, layer: int) -> dict[str, Tensor]:
        """Return `layer_state` with whole tensors; the team of the stage calls it together."""
        return self._stage.whole_of(layer, self.layer_state(layer))

    def master_state(self, layer: int) -> dict[str, Tensor]:
        """Return all weights of a layer as they are exported: masters where there are any."""
        state = self._stage.layer_state(layer)
        return state | {name: slot.master for name, slot in self._of_layer(layer)}

    def _of_layer(self, layer: int) -> Iterator[tuple[str, _Slot]]:
        slot_of = {id(slot.parameter): slot for slot in self._slots.values()}
        for name, parameter in self._stage.layer_parameters(layer).items():
            if id(parameter) in slot_of:
                yield name, slot_of[id(parameter)]


def clip_factor(norm: float, max_norm: float | None) -> float:
    """Return what gradients of this global norm are multiplied with; 1 without a limit.

    Raises: UserError for a norm that is no number: the step must not be taken.
    """
    if not math.isfinite(norm):
        raise UserError(
            f"the norm of the gradients is {norm}: the loss has diverged or the data is broken",
            hint="lower the learning rate, add warm-up steps, or compute in float32",
        )
    if max_norm is None or norm <= max_norm:
        return 1.0
    return max_norm / norm


def _pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Yield tensors of one shape piece by piece, as views; whole where they are small."""
    if tensors[0].numel() <= PIECE_VALUES or not all(t.is_contiguous() for t in tensors):
        return [tensors]
    return zip(*(t.view(-1).split(PIECE_VALUES) for t in tensors), strict=True)


def _slot(parameter: nn.Parameter, settings: AdamSettings) -> _Slot:
    values = parameter.data
    master = values if values.dtype == torch.float32 else values.float()
    return _Slot(
        parameter=parameter,
        master=master,
        exp_avg=torch.zeros_like(master),
        exp_avg_sq=torch.zeros_like(master),
        weight_decay=settings.weight_decay if parameter.ndim > 1 else 0.0,
    )
