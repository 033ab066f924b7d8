"""Profiles, links and memory of a job as tables that cuts are made from. Start at `TableBook`.

For one model, one micro-batch and one number of optimizer shards. A run of layers counts with the
cheapest recomputation under which it fits, and is infinite where none makes it fit. Knows nothing
of plans; `predict` is the judge of those.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mxn.train.plan.cluster import Link
from mxn.train.plan.memory import flight_bytes, stage_parts
from mxn.train.plan.plan import Recompute
from mxn.train.plan.search.columns import Columns, Job, Kind, run_sums
from mxn.train.plan.search.cuts import Cut, Table


class TableBook:
    """All tables of one search, each made once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._columns: dict[tuple[int, int], Columns] = {}
        self._tables: dict[tuple[int, int, int], Tables] = {}

    def at(self, micro_batch: int, shards: int = 1, experts: int = 1) -> Tables:
        """Return the tables for micro-batches of so many rows.

        `shards` pipelines share the optimizer state, `experts` of them the experts of a layer.
        """
        key = (micro_batch, shards, experts)
        if key not in self._tables:
            if (micro_batch, experts) not in self._columns:
                self._columns[micro_batch, experts] = Columns(self.job, micro_batch, experts)
            columns = self._columns[micro_batch, experts]
            self._tables[key] = Tables(self.job, micro_batch, shards, experts, columns)
        return self._tables[key]


class Tables:
    """Seconds and bytes of every run of layers on every kind of slot."""

    def __init__(
        self, job: Job, micro_batch: int, shards: int, experts: int, columns: Columns
    ) -> None:
        self.job = job
        self.experts = experts
        self.micro_batch = micro_batch
        self.shards = shards
        self._columns, self._widest = columns.of, columns.widest
        self._owned: dict[tuple[Kind, str], Table] = {}
        self._memory: dict[tuple[Kind, Recompute], tuple[Table, Table]] = {}
        self._busy: dict[tuple[Kind, float], Table] = {}
        self._parts: dict[tuple[Kind, float], tuple[Table, Table, Table, Table]] = {}
        self._most: dict[tuple[Kind, Recompute], Table] = {}
        self._fits: dict[tuple[Kind, Recompute, float], Table] = {}
        self._shares: dict[bytes, Table] = {}
        self._steps: dict[tuple[Kind, Kind, float], Table] = {}
        self._hops: dict[tuple[Kind, Kind], Table] = {}

    def busy(self, kind: Kind, in_flight: float) -> Table:
        """Return seconds [a, e] through layers a … e - 1 with `in_flight` micro-batches kept."""
        key = (kind, in_flight)
        if key not in self._busy:
            options = (self._fitting(kind, how, in_flight) for how in self.job.recompute)
            self._busy[key] = functools.reduce(np.minimum, options)  # of a list it would copy all
        return self._busy[key]

    def parts(self, kind: Kind, in_flight: float) -> tuple[Table, Table, Table, Table]:
        """Return what `busy` is of: seconds [a, e] forward, backward, its weight half; and those
        of the optimizer. Where nothing fits they mean nothing.
        """
        key = (kind, in_flight)
        if key not in self._parts:
            options = [self._fitting(kind, how, in_flight) for how in self.job.recompute]
            choice = np.argmin(options, axis=0)
            columns = [self._columns(kind, how) for how in self.job.recompute]
            forward, weight, busy = (
                np.choose(choice, [of[name] for of in columns])
                for name in ("forward_s", "weight_s", "busy_s")
            )
            self._parts[key] = (forward, busy - forward, weight, self.owned(kind, "optimizer_s"))
        return self._parts[key]

    def step(self, kind: Kind, after: Kind, in_flight: float) -> Table:
        """Return `busy` with the hop to a slot of kind `after` added."""
        key = (kind, after, in_flight)
        if key not in self._steps:
            self._steps[key] = self.busy(kind, in_flight) + self.hop(kind, after)
        return self._steps[key]

    def recompute(self, kind: Kind, in_flight: float, first: int, end: int) -> Recompute:
        """Return the cheapest recomputation under which these layers fit."""

        def seconds(how: Recompute) -> float:
            return float(self._fitting(kind, how, in_flight)[first, end])

        return min(self.job.recompute, key=seconds)

    def bytes(self, kind: Kind, how: Recompute, in_flight: float) -> Table:
        """Return the bytes on one device."""
        key = (kind, how)
        if key not in self._memory:
            empty = self._held(kind, how, 0.0)
            self._memory[key] = (empty, self._held(kind, how, 1.0) - empty)
        fixed, each = self._memory[key]
        return fixed + each * in_flight

    def _held(self, kind: Kind, how: Recompute, in_flight: float) -> Table:
        sums = self._columns(kind, how)
        profile = self.job.profiles[self.job.cluster.group(kind.group).chip]
        model = profile.memory or self.job.memory
        tokens = self.micro_batch * self.job.shape.seq_tokens
        sizes = np.array([0.0, *(layer.output_bytes * tokens for layer in self.job.shape.layers)])
        ins, outs = sizes[:, None] * self._widest, sizes[None, :] * profile.width
        # The formulas work on tables too.
        flight = flight_bytes(sums["kept_bytes"], ins, outs, how, model)  # type: ignore[arg-type]
        return stage_parts(
            params=sums["params"],  # type: ignore[arg-type]
            owned_params=self.owned(kind, "params"),  # type: ignore[arg-type]
            kept_per_micro_batch=flight,
            working_bytes=sums["working_bytes"],  # type: ignore[arg-type]
            micro_batches_kept=in_flight,
            model=model,
            framework_bytes=profile.framework_bytes,
            message_bytes=np.maximum(ins, outs),  # type: ignore[arg-type]
        ).total  # type: ignore[return-value]

    def owned(self, kind: Kind, what: str) -> Table:
        """Return "params" or "optimizer_s" [a, e] of the shard that has most."""
        key = (kind, what)
        if key not in self._owned:
            whole = self._columns(kind, "none")[what]
            if self.shards == 1 or not self.job.memory.shares_layers:
                self._owned[key] = whole / self.shards
            else:
                self._owned[key] = self._largest(whole)
        return self._owned[key]

    def _largest(self, whole: Table) -> Table:
        """As `costs.largest_share`, of all runs at once.

        Chips differ by a factor in what they take for a parameter: like layers are done once.
        """
        size = len(whole)
        values = whole[range(size - 1), range(1, size)]
        top = float(values.max())
        if top <= 0:
            return np.zeros_like(whole)
        values = np.round(values / top, 12)
        key = values.tobytes()
        if key not in self._shares:
            self._shares[key] = self._largest_of(values)
        return self._shares[key] * top

    def _largest_of(self, values: NDArray[np.float64]) -> Table:
        size, is_tied = len(values) + 1, self.job.shape.is_tied
        ends = np.isin(np.arange(size - 1), (0, size - 2)) & is_tied
        always = run_sums(np.where(ends, values, 0.0))
        if is_tied:
            always[0, -1] -= values[0]
        numbers = np.arange(size - 1) % self.shards
        num = min(self.shards, size - 1)
        owned = np.where((numbers == np.arange(num)[:, None]) & ~ends, values, 0.0)
        sums = np.concatenate([np.zeros((num, 1)), np.cumsum(owned, axis=1)], axis=1)
        return always + (sums[:, None, :] - sums[:, :, None]).max(axis=0)

    def hop(self, kind: Kind, after: Kind) -> Table:
        """Return the seconds of a micro-batch from `kind` to `after` and back, by first layer.

        Neighbours of one group are taken to share a node where a node has two such slots.
        """
        key = (kind, after)
        if key not in self._hops:
            link, tp = self._link(kind, after), min(kind.tp, after.tp)
            profile = self.job.profiles[self.job.cluster.group(kind.group).chip]
            values = self.micro_batch * self.job.shape.seq_tokens * profile.width
            sizes = [0.0, *(layer.output_on(tp) * values for layer in self.job.shape.layers)]
            known = {
                size: 2 * link.transfer_s(size, is_float32=profile.is_float32)
                for size in set(sizes)
            }
            self._hops[key] = np.array([known[size] for size in sizes])
        return self._hops[key]

    def after_s(self, kinds: Sequence[Kind], cut: Cut, reduce_links: Sequence[Link]) -> float:
        """Return what follows the last micro-batch: the largest optimizer and sum of gradients.

        An estimate: twice the bytes over each of `reduce_links`; none of them where there is one
        pipeline.
        """
        model, worst = self.job.memory, 0.0
        for stage, number in enumerate(cut.kinds):
            run = (cut.bounds[stage], cut.bounds[stage + 1])
            sums = self._columns(kinds[number], "none")
            size = float(sums["params"][run]) * model.reduce_bytes * model.trainable_share
            seconds = float(self.owned(kinds[number], "optimizer_s")[run])
            sum_s = sum(2 * link.transfer_s(size, is_float32=True) for link in reduce_links)
            backward_s = float(sums["busy_s"][run] - sums["forward_s"][run])
            worst = max(worst, seconds + self.exposed_s(kinds[number], sum_s, backward_s))
        return worst

    def exposed_s(self, kind: Kind, sum_s: float, backward_s: float) -> float:
        """Return at least how much of a sum of gradients the last backward pass does not hide."""
        profile = self.job.profiles[self.job.cluster.group(kind.group).chip]
        return max(sum_s - backward_s, 0.0) if profile.overlaps_sums else sum_s

    def backward_share(self, kind: Kind) -> float:
        """Return which part of the work of the whole model is backward, on one slot."""
        sums = self._columns(kind, "none")
        return 1 - float(sums["forward_s"][0, -1]) / max(self.work_s(kind), 1e-30)

    def work_s(self, kind: Kind) -> float:
        """Return the seconds of the whole model on one slot, nothing recomputed, fitting or not."""
        return float(self._columns(kind, "none")["busy_s"][0, -1])

    def _link(self, kind: Kind, after: Kind) -> Link:
        if kind.group != after.group:
            return self.job.cluster.link(kind.group, 0, after.group, 0)
        group = self.job.cluster.group(kind.group)
        near = group.devices_per_node >= kind.tp + after.tp
        return group.node_link if near else group.group_link

    def _fitting(self, kind: Kind, how: Recompute, in_flight: float) -> Table:
        key = (kind, how, in_flight)
        if key not in self._fits:
            fits = self._most_in_flight(kind, how) >= in_flight
            self._fits[key] = np.where(fits, self._columns(kind, how)["busy_s"], np.inf)
        return self._fits[key]

    def _most_in_flight(self, kind: Kind, how: Recompute) -> Table:
        """Return how many micro-batches fit into the memory of one device, -1: not even none."""
        key = (kind, how)
        if key not in self._most:
            limit = self.job.cluster.group(kind.group).memory_bytes
            fixed = self.bytes(kind, how, 0.0)
            each = self.bytes(kind, how, 1.0) - fixed
            with np.errstate(divide="ignore", invalid="ignore"):
                most = (limit - fixed) / each
            self._most[key] = np.where(fixed > limit, -1.0, np.where(each > 0, most, np.inf))
        return self._most[key]
