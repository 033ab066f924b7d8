"""A rank's side of checkpoints and of being asked to end: what its loop calls once a step.

    keeper = Keeper(job, plan, rank, launch, parts, facts)
    position = keeper.resume()                   # behind what was saved, or at the start
    for step in range(position.step, num_steps):
        ... gather keeper.wish(step) of rank 0 with the numbers of the step ...
        if keeper.obey(wish, step + 1, tokens):  # saves where wished; True: end here
            break
    keeper.close(...)

Knows which layers this rank writes. Talks to no other rank: what rank 0 wishes comes back to it
through the sums of the step, so that all ranks do the same behind the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxn.train.plan.plan import TrainPlan
from mxn.train.run.checkpoint import Checkpointer, Position, Stored
from mxn.train.run.checkpoint import manifest as manifests
from mxn.train.run.checkpoint.stored import check_job
from mxn.train.run.checkpoint.writer import Identity, due, owned_layers
from mxn.train.run.control import Control
from mxn.train.run.job import Job
from mxn.train.run.loss_scale import LossScale
from mxn.train.run.net import StageModule
from mxn.train.run.optim import AdamW

if TYPE_CHECKING:
    from torch import Tensor

GO_ON, SAVE, SAVE_AND_END = 0.0, 1.0, 2.0

Part = tuple[StageModule, AdamW]


class Keeper:
    """Saves and restores the layers of one rank."""

    def __init__(
        self,
        job: Job,
        plan: TrainPlan,
        *,
        rank: int,
        launch: int,
        parts: Sequence[Part],
        holders: Mapping[int, list[int]],
        num_ranks: int,
        facts: Mapping[str, Any],
        loss_scale: LossScale | None = None,
        before_save: Callable[[], float | None] = lambda: None,
    ) -> None:
        """`parts`: the chunks of this rank; `holders`: which ranks hold a layer as this one does,
        by layer; `facts`: what `from_job.facts` says, kept for errors; `before_save`: makes copies
        of a layer equal and returns how far apart they were (`Replicas.align`).
        """
        self._loss_scale = loss_scale or LossScale()
        self._idle_scale: tuple[float | None, int] = (None, 0)  # of ranks that computed in float16
        self._before_save = before_save
        self._drift: float | None = None
        self.job, self.rank, self.parts = job, rank, tuple(parts)
        self._owned = set(owned_layers(holders, rank))
        self._control = Control(Path(job.out), launch)
        self._saved_s = time.monotonic()
        self._saved_step = -1
        self._tokens = 0
        self._facts = dict(facts)
        identity = Identity(
            job=f"{job.fingerprint}-{facts['rows'][:16]}",
            plan=plan.fingerprint, plan_json=plan.to_json(), num_layers=plan.num_layers,
            num_ranks=num_ranks, launch=launch, told=self._facts,
        )  # fmt: skip
        self.writer = Checkpointer(
            Path(job.checkpoint.folder), rank=rank, identity=identity, keep=job.checkpoint.keep
        )

    def resume(self, step: int | None) -> Position:
        """Load the checkpoint of `step` into all parts; None: there is none, begin.

        Raises: BrokenError when a file is not as it was written; UserError for another job's.
        """
        if step is None:
            return Position(step=0, micro_batch=0)
        stored = Stored.open(Path(self.job.checkpoint.folder) / manifests.folder_name(step))
        check_job(stored, self.writer.identity.job, self._facts)
        position = stored.manifest.position
        for stage, optimizer in self.parts:
            for layer in range(stage.first, stage.end):
                optimizer.load_layer_state(layer, stored.layer(layer))
            optimizer.num_steps = position.step if position.updates is None else position.updates
        self._loss_scale.go_on(position.loss_scale, position.good_steps)
        self._idle_scale = position.loss_scale, position.good_steps
        self._saved_step, self._tokens = position.step, position.tokens
        return position

    def use(self, plan: TrainPlan) -> None:
        """Say another plan in the next checkpoints: the same cut with other micro-batches."""
        self.writer.identity = replace(
            self.writer.identity, plan=plan.fingerprint, plan_json=plan.to_json()
        )

    def wish(self, step: int) -> float:
        """Return what rank 0 wants behind step `step` (from 0); other ranks want nothing."""
        if self.rank != 0:
            return GO_ON
        if self._control.is_pause_asked():
            return SAVE_AND_END
        chosen = self.job.checkpoint
        since_s = time.monotonic() - self._saved_s
        return SAVE if due(step + 1, since_s, chosen.every_steps, chosen.every_seconds) else GO_ON

    def obey(self, wish: float, steps_done: int, num_tokens: int) -> bool:
        """Save where all ranks agreed to; return whether they are to end.

        `num_tokens`: what the step just done learnt from.
        """
        self._tokens += num_tokens
        if wish != GO_ON:
            self.save(steps_done)
        return wish == SAVE_AND_END

    def save(self, steps_done: int) -> None:
        """Begin to write a checkpoint; every rank calls it behind the same step."""
        if steps_done == self._saved_step:
            return
        if (drift := self._before_save()) is not None:
            self._drift = drift
        layers: dict[int, dict[str, Tensor]] = {}
        for stage, optimizer in self.parts:
            for layer in sorted(self._owned & {*range(stage.first, stage.end)}):
                state = optimizer.whole_layer_state(layer)  # its whole team comes by here
                if stage.team is None:
                    layers[layer] = state
                elif layer % stage.team.size == stage.team.index:
                    layers[layer] = {name: tensor.cpu() for name, tensor in state.items()}
        self.writer.save(self._position(steps_done), layers)
        self._saved_step, self._saved_s = steps_done, time.monotonic()

    def _position(self, steps_done: int) -> Position:
        scale, updates = self._loss_scale, self.parts[0][1].num_steps
        value, good_steps = (scale.value, scale.good_steps) if scale.is_on else self._idle_scale
        return Position(
            step=steps_done, micro_batch=steps_done * self.job.micro_batches, tokens=self._tokens,
            # Steps that were left out stay left out where the job goes on without float16.
            updates=None if updates == steps_done else updates,
            loss_scale=value, good_steps=good_steps,
        )  # fmt: skip

    def close(self) -> None:
        """Wait until the last checkpoint is on the disk. Raises: MxnError when it failed."""
        self.writer.close()

    def costs(self) -> dict[str, float]:
        """Seconds that checkpoints took so far, for the metrics of a step.

        With copies of layers on different chips also how far apart they were at the last one.
        """
        costs = self.writer.costs
        told = {"checkpoint_stall_s": costs.copy_s + costs.wait_s}
        return told if self._drift is None else told | {"replica_drift": self._drift}
