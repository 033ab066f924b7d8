"""The training loop: Muon for matrices, AdamW for the rest, linear decay, best validation kept.

Resumable: the state is written to a work folder, and the same settings continue from it. Until
the decay begins nothing depends on the number of steps, so a run may also be continued with
another one: the result is that of a straight run. Knows the networks only as modules. Start at
`train`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shakespeare.batches import Batches
from shakespeare.evaluate import nats_per_token
from shakespeare.nets import Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that decides the result of a run, besides the shape and the text."""

    steps: int
    seed: int
    batch_tokens: int = 2048
    row_tokens: int = 256
    long_row_tokens: int = 1024
    long_share: float = 0.2  # the last part of the steps sees long rows
    decay_share: float = 0.35  # the last part of the steps, over which the rate falls to zero
    dialogue_share: float = 0.25
    dropout: float = 0.05
    matrix_lr: float = 4e-3
    other_lr: float = 4e-3
    weight_decay: float = 0.1
    long_steps: int = 0  # further steps of long rows only, after `steps`
    long_lr_share: float = 0.5  # the rate at the start of the further steps
    warmup_steps: int = 40
    clip_norm: float = 1.0
    balance_rate: float = 2e-3  # of the expert bias, per step
    valid_every: int = 100

    @property
    def all_steps(self) -> int:
        return self.steps + self.long_steps

    @property
    def steady_steps(self) -> int:
        """Steps before the first that depends on `steps`."""
        return int(self.steps * (1 - max(self.decay_share, self.long_share)))

    def row_tokens_at(self, step: int) -> int:
        is_long = step >= self.steps * (1 - self.long_share)
        return self.long_row_tokens if is_long else self.row_tokens

    def context(self, step: int) -> int:
        """Return the tokens of a validation window after `step` steps."""
        return self.long_row_tokens if step > self.steps else self.row_tokens

    def lr_factor(self, step: int) -> float:
        """Return the share of the learning rate: warm-up, steady, then a line down to zero.

        Further long steps start at `long_lr_share` and go down to zero once more.
        """
        if step >= self.steps:
            return self.long_lr_share * (self.all_steps - step) / self.long_steps
        return min(
            1.0,
            (step + 1) / self.warmup_steps,
            (self.steps - step) / (self.steps * self.decay_share),
        )

    def can_continue(self, older: Settings, step: int) -> bool:
        """Return whether `step` steps under `older` are also the first steps under these."""
        if step > min(self.steady_steps, older.steady_steps):
            is_longer = step <= self.steps and older.long_steps == 0
            return self == (replace(older, long_steps=self.long_steps) if is_longer else older)
        return self == replace(older, steps=self.steps, decay_share=self.decay_share)


@dataclass(slots=True)
class RunState:
    """What a resumed run needs besides weights and optimizer moments."""

    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    best_nats: float = math.inf
    best_step: int = 0


SAVE_EVERY = 25
Report = Callable[[dict[str, Any]], None]


def make_optimizers(network: Network, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding, head, router and norms."""
    matrices, others, plain = [], [], []
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            plain.append(parameter)
        elif "layers" in name and not name.endswith("gate.weight"):
            matrices.append(parameter)
        else:
            others.append(parameter)
    muon = torch.optim.Muon(
        matrices,
        lr=settings.matrix_lr,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    groups = [
        {"params": others, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=settings.other_lr, betas=(0.9, 0.97), eps=1e-10)
    return [muon, adam]


def loss_of(network: Network, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats; matrix products in bfloat16, the loss in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Trainer:
    """One run: network, optimizers, state, and the folder that they are kept in."""

    def __init__(self, network: Network, batches: Batches, settings: Settings, work: Path) -> None:
        self.network, self.batches, self.settings = network, batches, settings
        self.optimizers = make_optimizers(network, settings)
        self.state = RunState()
        self._last, self._best = work / "last.pt", work / "best.pt"
        work.mkdir(parents=True, exist_ok=True)

    def resume(self) -> bool:
        """Continue a stored run. Raises: ValueError if it was made with other settings."""
        if not self._last.exists():
            return False
        stored = torch.load(self._last, weights_only=True)
        step = stored["state"]["step"]
        if not self.settings.can_continue(Settings(**stored["settings"]), step):
            raise ValueError(
                f"{self._last} is at step {step} of a run with other settings: "
                f"{stored['settings']}; give another --work folder or remove it"
            )
        self.network.load_state_dict(stored["network"])
        for optimizer, moments in zip(self.optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(moments)
        torch.set_rng_state(stored["rng"])
        self.state = RunState(**stored["state"])
        return True

    def save(self) -> None:
        part = self._last.with_suffix(".part")
        torch.save(
            {
                "settings": asdict(self.settings),
                "network": self.network.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "rng": torch.get_rng_state(),
                "state": asdict(self.state),
            },
            part,
        )
        part.replace(self._last)  # a run killed while it saves keeps the older state

    def step(self) -> float:
        """Do one step; return its loss in nats per token."""
        settings, step = self.settings, self.state.step
        inputs, targets = self.batches.at(
            step, batch_tokens=settings.batch_tokens, row_tokens=settings.row_tokens_at(step)
        )
        loss = loss_of(self.network, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip_norm)
        factor = settings.lr_factor(step)
        for optimizer, lr in zip(
            self.optimizers, (settings.matrix_lr, settings.other_lr), strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        return float(loss.detach())

    def validate(self, ids: Tensor) -> float:
        """Return nats per token of the validation text; keep the weights if they are the best."""
        nats = nats_per_token(self.network, ids, context=self.settings.context(self.state.step))
        if nats < self.state.best_nats:
            self.state.best_nats, self.state.best_step = nats, self.state.step
            torch.save(self.network.state_dict(), self._best)
        return nats

    def best(self) -> Network:
        """Return the network with the weights of the best validation."""
        self.network.load_state_dict(torch.load(self._best, weights_only=True))
        return self.network.eval()


def train(trainer: Trainer, valid_ids: Tensor, report: Report) -> RunState:
    """Run to the last step; `report` gets a dict for every step."""
    settings, state = trainer.settings, trainer.state
    trainer.network.train()
    ends = (settings.steps, settings.all_steps)
    while state.step < settings.all_steps:
        if state.step == settings.steps:
            state.best_nats = math.inf  # from here on, long rows are what is judged
        started, cpu_started = time.monotonic(), time.process_time()
        event: dict[str, Any] = {"loss": trainer.step(), "step": state.step}
        loads = [r.balance(settings.balance_rate) for r in trainer.network.routers()]
        if loads:
            event["max_load"] = max(loads)
        is_due = state.step % settings.valid_every == 0 or state.step in ends
        if is_due:
            event["valid_nats"] = trainer.validate(valid_ids)
        state.seconds += time.monotonic() - started
        state.cpu_seconds += time.process_time() - cpu_started
        if is_due or state.step % SAVE_EVERY == 0:
            trainer.save()
        report(event | {"seconds": state.seconds})
    return state
