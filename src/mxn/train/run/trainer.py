"""One rank of a training job: its layers, its row of actions, its part of every step.

Puts executor, gradients and optimizer together; the result of a step is that of `SingleTrainer` to
float noise. Knows no files, checkpoints or processes. Start at `RankTrainer.train_step`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache, partial
from zlib import crc32

import torch
from torch import Tensor, nn

from mxn.errors import InternalError
from mxn.train.plan.schedules import Order, order
from mxn.train.run import lora
from mxn.train.run.bridge import Bridge
from mxn.train.run.data import MicroBatch, Rows
from mxn.train.run.deferred import Add, DeferredWeights
from mxn.train.run.executor import Executor, StepWork
from mxn.train.run.gradients import Gradients
from mxn.train.run.loss_scale import LossScale
from mxn.train.run.net import StageModule
from mxn.train.run.open_batches import Sharing, can_be_open
from mxn.train.run.optim import AdamW, GradientSums, clip_factor
from mxn.train.run.placement import Placement
from mxn.train.run.rank_step import RankStep, RankTimes
from mxn.train.run.rebalance import Counts, counts_of, with_counts
from mxn.train.run.replicas import Replicas
from mxn.train.run.schedule import learning_rate
from mxn.train.run.sharded import ShardedAdamW
from mxn.train.run.single import RunSettings, StepLog
from mxn.train.run.team import open_teams
from mxn.train.run.weights import ModelSource


class RankTrainer:
    """The layers that one rank holds, and what it does with them in each step."""

    def __init__(
        self,
        source: ModelSource,
        rows: Rows,
        settings: RunSettings,
        placement: Placement,
        bridge: Bridge,
        *,
        dtypes: Sequence[torch.dtype],
        orders: Sequence[Order] | None = None,
        open_share: float = 0.0,
    ) -> None:
        """`dtypes` by rank. `orders` by pipeline; without them the plan's schedule gives them.
        `open_share` of the micro-batches go to who gets to them first, see `open_batches.py`.

        All ranks make theirs at the same time. Raises: UnsupportedError for a plan or a LoRA
        target that cannot be run.
        """
        rank = bridge.rank
        self.rows, self.settings, self.placement, self.bridge = rows, settings, placement, bridge
        self.place = placement.places[rank]
        self.team = open_teams(bridge, placement.all_teams())
        stage = placement.stage_of(rank)
        self.chunks: list[StageModule] = []
        for chunk in stage.chunks:
            module = source.stage(
                chunk.first,
                chunk.end,
                dtype=dtypes[rank],
                device=bridge.device,
                recompute=stage.recompute,
                team=self.team,
            )
            if settings.lora:
                lora.attach(module, settings.lora, seed=settings.seed)
            self.chunks.append(module)
        self.sums = [GradientSums(module) for module in self.chunks]
        self.gradients = Gradients(placement, bridge, self.chunks, self.sums)
        self._holders = placement.holders(self.place.index)
        self.optimizers = [self._optimizer(module) for module in self.chunks]
        self._replicas = Replicas(placement, bridge, self.chunks, self.optimizers, dtypes=dtypes)
        plan = placement.plan
        self.loss_scale = LossScale.for_step(
            plan.micro_batches * plan.micro_batch * plan.seq_tokens,
            is_on=torch.float16 in dtypes,
        )
        self.step = 0  # the next one
        bridge.open_channels(list(placement.channels()))
        self._orders, self._dtypes = orders, dtypes
        self._deferred: list[DeferredWeights] = []
        self._before_s = 0.0  # of the step before
        share = open_share if can_be_open(plan) and not orders else 0.0
        self._sharing = Sharing(bridge, self.place.pipeline, self.counts, open_share=share)
        self.executor = self._executor()

    @property
    def counts(self) -> Counts:
        """Return the micro-batches of a step, by pipeline."""
        return counts_of(self.placement.plan)

    def set_counts(self, counts: Counts) -> None:
        """Do the next steps with other micro-batches for each pipeline; all ranks at once.

        Raises: InternalError for counts that are not of this plan, or for orders made for others.
        """
        if counts == self.counts:
            return
        if self._orders:
            raise InternalError("the given orders are for the plan's counts only")
        self.placement = Placement(with_counts(self.placement.plan, counts))
        self._sharing.use(counts)
        self.executor = self._executor()

    def _executor(self) -> Executor:
        placement, number = self.placement, self.place.pipeline
        if self._sharing.has_open:
            owned = self._sharing.owned
            placement = Placement(with_counts(placement.plan, owned, is_all=False))
        all_rows = self._orders[number] if self._orders else _order(placement, number)
        row = all_rows[self.place.stage]
        if not self._deferred and any(action.kind == "W" for action in row):
            self._deferred = [
                DeferredWeights(module, _adder(sums))
                for module, sums in zip(self.chunks, self.sums, strict=True)
            ]
        return Executor(
            placement,
            self.place,
            row,
            self.chunks,
            self.bridge,
            team=self.team,
            dtypes=[
                self._dtypes[placement.rank_of_part(number, part)]
                for part in range(placement.num_parts(number))
            ],
            deferred=self._deferred,
            before_last=self.gradients.arm,
            after_last=self.gradients.complete,
        )

    def train_step(self, flags: int = 0) -> RankStep:
        """Do the next step together with all other ranks.

        `flags` are bits that every rank learns with this step. Raises: PeerError when another rank
        is lost; UserError when the gradients are no numbers, on all ranks alike.
        """
        begin_s = time.perf_counter()
        self.gradients.clear()
        loss_scale = self.loss_scale.value
        first = self.step * self.settings.micro_batches
        work = self.executor.run(
            lru_cache(4)(partial(self._batch, first)),
            loss_scale=loss_scale,
            more=self._sharing.begin(self.step),
        )
        computed_s = time.perf_counter()
        self.gradients.finish()
        summed_s = time.perf_counter()
        mine = RankTimes(
            busy_s=max(0.0, work.total_s - work.waited_s - self.gradients.started_s),
            waited_s=work.waited_s,
            reduce_s=summed_s - computed_s + self.gradients.started_s,
        )
        square, loss, tokens, said, times, done, step_s = self._exchange(work, flags, mine)
        told_s = time.perf_counter()
        share = 1 / max(1, tokens)
        norm = square**0.5 * share / loss_scale
        rate = learning_rate(self.settings.schedule, self.step)
        if is_taken := self.loss_scale.takes(norm):
            factor = clip_factor(norm, self.settings.clip_norm)
            self._update(rate, share * factor / loss_scale)
        end_s = time.perf_counter()
        log = StepLog(
            step=self.step,
            loss=loss * share,
            num_tokens=tokens,
            learning_rate=rate,
            gradient_norm=norm,
            seconds=end_s - begin_s,
            loss_scale=loss_scale,
            is_taken=is_taken,
        )
        self.step += 1
        self._before_s = log.seconds
        self._sharing.note([spent.busy_s for spent in times], done)
        return RankStep(
            log=log,
            flags=said,
            times=times,
            counts=self.counts,
            done=done,
            step_s=step_s,
            optimizer_s=end_s - told_s,
        )

    def align(self, *, judge: bool = True) -> float | None:
        """Make copies of layers on different chips the same bits; see `Replicas.align`."""
        return self._replicas.align(judge=judge)

    def _update(self, rate: float, scale: float) -> None:
        for optimizer, sums in zip(self.optimizers, self.sums, strict=True):
            optimizer.step(sums, rate, scale=scale)
        if self.placement.plan.shards_optimizer:
            self.gradients.share_weights(lambda chunk, key: self.optimizers[chunk].master(key))

    def _optimizer(self, module: StageModule) -> AdamW:
        if not self.placement.plan.shards_optimizer:
            return AdamW(module, self.settings.adam)
        return ShardedAdamW(
            module,
            self.settings.adam,
            rank=self.bridge.rank,
            holders=self._holders,
            undivided=self.gradients.tied_keys,
        )

    def _exchange(
        self, work: StepWork, flags: int, times: RankTimes
    ) -> tuple[float, float, int, int, tuple[RankTimes, ...], Counts, float]:
        """Return squared norm, sum of losses, tokens, flags, times of all ranks, what pipelines
        did, and the seconds of rank 0's step before.

        Numbers are added in the order of ranks, so that every rank has the same bits.
        Raises: InternalError when ranks share out the step's micro-batches differently.
        """
        loss, num_tokens = 0.0, 0
        if work.losses and self.place.index == 0:  # the rest of its team has the same
            loss = torch.stack(work.losses).cpu().double().sum().item()
            num_tokens = work.num_tokens
        mine = [self.gradients.square_norm(), loss, float(num_tokens), float(flags)]
        said = 0
        square = total = tokens = 0.0
        seen: list[RankTimes] = []
        told = [times.busy_s, times.waited_s, times.reduce_s]
        shared_out = float(crc32(repr(self.counts).encode()))
        rows = self.bridge.gather([*mine, shared_out, self._before_s, work.num_done, *told])
        for others, other_loss, other_tokens, other_flags, theirs, _, _, *spent in rows:
            if theirs != shared_out:
                raise InternalError("ranks disagree on who does which micro-batches of a step")
            square, total = square + others, total + other_loss
            tokens, said = tokens + other_tokens, said | int(other_flags)
            seen.append(RankTimes(busy_s=spent[0], waited_s=spent[1], reduce_s=spent[2]))
        done = self.counts
        if self._sharing.has_open:  # every pipeline is one rank
            done = self._sharing.check(int(row[6]) for row in rows)
        return square, total, int(tokens), said, tuple(seen), done, rows[0][5]

    def _batch(self, first: int, micro_batch: int) -> MicroBatch:
        place = self._sharing.place_of(micro_batch)
        return self.rows.micro_batch(first + place).to(self.bridge.device)


def _order(placement: Placement, number: int) -> Order:
    pipeline = placement.plan.pipelines[number]
    return order(
        placement.plan.schedule,
        len(pipeline.stages),
        len(pipeline.stages[0].chunks),
        pipeline.micro_batches,
        extra_warmup=pipeline.extra_warmup or 0,
    )


def _adder(sums: GradientSums) -> Add:
    """Return what adds a put-off product to a stage's sums."""
    key_of = {id(sums.parameter(key)): key for key in sums}

    def add(weight: nn.Parameter, gradient_SF: Tensor, input_SD: Tensor) -> None:
        total = sums[key_of[id(weight)]]
        if total.dtype == gradient_SF.dtype:
            total.addmm_(gradient_SF.t(), input_SD)
        else:
            total.add_(gradient_SF.t() @ input_SD)

    return add
