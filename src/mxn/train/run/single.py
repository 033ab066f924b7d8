"""A whole training job on one device: what every other way of running it must agree with.

Knows no other ranks, checkpoints or files. Start at `SingleTrainer.run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from mxn.errors import ConfigError
from mxn.train.run import lora
from mxn.train.run.data import Rows
from mxn.train.run.lora import LoraSettings
from mxn.train.run.loss_scale import LossScale
from mxn.train.run.net.stage import Recompute
from mxn.train.run.optim import AdamSettings, AdamW, GradientSums, clip_factor
from mxn.train.run.schedule import Schedule, learning_rate
from mxn.train.run.weights import ModelSource


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a job does with its rows, wherever it runs."""

    schedule: Schedule
    micro_batches: int  # of a step
    adam: AdamSettings = field(default_factory=AdamSettings)
    clip_norm: float | None = 1.0
    lora: LoraSettings | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.micro_batches < 1:
            raise ConfigError(f"a step needs at least 1 micro-batch, got {self.micro_batches!r}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"clip_norm must be above 0 or none, got {self.clip_norm!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLog:
    """One step, as it is reported."""

    step: int  # counted from 0
    loss: float  # nats per token, mean over the tokens of the step, before the update
    num_tokens: int  # that were predicted
    learning_rate: float
    gradient_norm: float  # before clipping
    seconds: float
    loss_scale: float = 1.0
    is_taken: bool = True  # False: gradients did not fit into float16, nothing was updated


class SingleTrainer:
    """Model, data and optimizer of a job on one device."""

    def __init__(
        self,
        source: ModelSource,
        rows: Rows,
        settings: RunSettings,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        recompute: Recompute = "none",
    ) -> None:
        """`dtype`: of weights and activations; sums of gradients and the optimizer are float32."""
        self.rows, self.settings = rows, settings
        self.stage = source.stage(
            0, source.num_layers, dtype=dtype, device=device, recompute=recompute
        )
        if settings.lora:
            adapted = lora.attach(self.stage, settings.lora, seed=settings.seed)
            lora.check_targets(settings.lora, adapted)
        self.gradients = GradientSums(self.stage)
        self.optimizer = AdamW(self.stage, settings.adam)
        num_tokens = settings.micro_batches * rows.row_count * rows.seq_tokens
        self.loss_scale = LossScale.for_step(num_tokens, is_on=dtype == torch.float16)
        self.step = 0  # the next one

    def run(
        self, num_steps: int | None = None, on_step: Callable[[StepLog], None] | None = None
    ) -> list[StepLog]:
        """Do `num_steps` steps, by default up to the end of the schedule."""
        left = self.settings.schedule.num_steps - self.step
        logs = []
        for _ in range(left if num_steps is None else num_steps):
            logs.append(self.train_step())
            if on_step:
                on_step(logs[-1])
        return logs

    def train_step(self) -> StepLog:
        """Learn from the next micro-batches.

        Raises: UserError when the gradients are no numbers; the weights are then as before.
        """
        began = time.perf_counter()
        settings, first = self.settings, self.step * self.settings.micro_batches
        self.gradients.clear()
        losses, num_tokens, loss_scale = [], 0, self.loss_scale.value
        for index in range(first, first + settings.micro_batches):
            batch = self.rows.micro_batch(index)
            num_tokens += batch.num_tokens
            loss = self.stage(None, batch.to(self.stage.device))
            loss.backward(torch.full_like(loss, loss_scale))
            losses.append(loss.detach())
        share = 1 / max(1, num_tokens)
        norm = self.gradients.square_norm().sqrt().item() * share / loss_scale
        rate = learning_rate(settings.schedule, self.step)
        if is_taken := self.loss_scale.takes(norm):
            scale = share * clip_factor(norm, settings.clip_norm) / loss_scale
            self.optimizer.step(self.gradients, rate, scale=scale)
        total = torch.stack(losses).cpu().double().sum().item()
        log = StepLog(
            step=self.step,
            loss=total * share,
            num_tokens=num_tokens,
            learning_rate=rate,
            gradient_norm=norm,
            seconds=time.perf_counter() - began,
            loss_scale=loss_scale,
            is_taken=is_taken,
        )
        self.step += 1
        return log

    @torch.no_grad()
    def evaluate(self, rows: Rows, indices: Iterable[int]) -> float:
        """Return the mean loss, in nats per token, of some micro-batches of other rows."""
        total, num_tokens = 0.0, 0
        for index in indices:
            batch = rows.micro_batch(index)
            total += self.stage(None, batch.to(self.stage.device)).item()
            num_tokens += batch.num_tokens
        return total / max(1, num_tokens)
