"""Whether a chip's optimizer does what the CPU's does: AdamW's operators, and whole steps of it.

A chip that computes layers right and updates wrong trains another model than its neighbours, and
no loss shows it at first. AdamW works element by element, so a small matrix and a small vector tell
as much as all. Start at `check_optimizer`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mxn.train.run.gate.check import Finding, check_call, compared
from mxn.train.run.gate.record import record
from mxn.train.run.optim import AdamSettings, AdamW, GradientSums, Key, trainable
from mxn.train.run.weights import ModelSource

PLACE = "the optimizer AdamW"
_STEPS = 2  # the second one has something to remember
# Updates must not drown in the weights that they are added to.
_LEARNING_RATE = 0.1
# A step is a dozen operators one after another.
_SLACK = 4.0


def check_optimizer(
    source: ModelSource, device: torch.device, dtype: torch.dtype
) -> Iterator[Finding]:
    """Yield what was compared: each operator that a step calls, then two steps as a whole.

    Weights are of `dtype`; sums, moments and master weights are float32, as in training.
    """
    on_cpu = _Trial(source, torch.device("cpu"), dtype)
    on_cpu.step(0)  # state that is made once is made now
    findings = [
        finding
        for call in record(lambda: on_cpu.step(1), in_place=True)
        for finding in check_call(call, PLACE, device)
    ]
    yield from findings
    if any(finding.problem for finding in findings):
        return  # a step with a wrong operator is wrong, or cannot be done
    truth, got = (_Trial(source, place, dtype).results() for place in ("cpu", device))
    for name, want in truth.items():
        yield compared(PLACE, "AdamW.step", name, want, got[name], _SLACK, torch.float32)


class _Trial:
    """The smallest matrix and the smallest vector of a layer, and an optimizer for them."""

    def __init__(self, source: ModelSource, device: torch.device | str, dtype: torch.dtype) -> None:
        self._layer = min(1, source.num_layers - 1)
        place = torch.device(device)
        stage = source.stage(self._layer, self._layer + 1, dtype=dtype, device=place)
        found = sorted(trainable(stage).items(), key=lambda item: item[1].numel())
        first = {parameter.ndim > 1: key for key, parameter in reversed(found)}
        self._keys: set[Key] = {*first.values()}
        self._sums = GradientSums(stage)
        self._optimizer = AdamW(stage, AdamSettings(), owns=self._keys.__contains__)

    def step(self, number: int) -> None:
        self._sums.clear()
        for key in sorted(self._keys):
            parameter = self._sums.parameter(key)
            random = torch.Generator().manual_seed(parameter.numel() + number)
            gradient = torch.randn(parameter.shape, generator=random)
            self._sums[key].add_(gradient.to(parameter.device, parameter.dtype))
        self._optimizer.step(self._sums, _LEARNING_RATE, scale=0.5)

    def results(self) -> dict[str, Tensor]:
        """Return moments and updates after some steps, on the CPU, by name."""
        before = self._state()
        for number in range(_STEPS):
            self.step(number)
        after = self._state()
        return {
            name.replace(".master", ", its update"): (
                tensor - before[name] if name.endswith(".master") else tensor
            )
            for name, tensor in after.items()
        }

    def _state(self) -> dict[str, Tensor]:
        state = self._optimizer.layer_state(self._layer)
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
