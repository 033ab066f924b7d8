"""What every run of layers costs on every kind of slot, whatever holds the optimizer's state.

Start at `Columns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mxn.train.plan.cluster import Cluster
from mxn.train.plan.costs import CostBook, StageCost
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.plan import Chunk, Recompute, Stage
from mxn.train.plan.profile import Profiles
from mxn.train.plan.search.cuts import Table
from mxn.train.plan.shape import ModelShape


class Kind(NamedTuple):
    """A kind of slot: `tp` devices of a group, in one node."""

    group: str
    tp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a search is about."""

    shape: ModelShape
    cluster: Cluster
    profiles: Profiles
    memory: MemoryModel
    recompute: Sequence[Recompute] = ("none", "selective", "full")

    def num_slots(self, kind: Kind) -> int:
        """Return how many slots of this kind a group has; none spans two nodes."""
        group = self.cluster.group(kind.group)
        nodes, rest = divmod(group.num_devices, group.devices_per_node)
        return nodes * (group.devices_per_node // kind.tp) + rest // kind.tp

    def is_profiled(self, kind: Kind, micro_batch: int) -> bool:
        profile = self.profiles[self.cluster.group(kind.group).chip]
        kinds = {layer.kind for layer in self.shape.layers}
        return all(profile.has(layer, micro_batch, kind.tp) for layer in kinds)


class Columns:
    """Tables of one micro-batch; `of` makes those of a slot and a recomputation once."""

    def __init__(self, job: Job, micro_batch: int, experts: int) -> None:
        self._job = job
        self._book = CostBook(job.shape, job.profiles, micro_batch, expert_parallel=experts)
        self.widest = self._book.widest
        self._known: dict[tuple[Kind, Recompute], dict[str, Table]] = {}

    def of(self, kind: Kind, how: Recompute) -> dict[str, Table]:
        key = (kind, how)
        if key not in self._known:
            costs = self._layer_costs(kind, how)
            self._known[key] = tables = _run_tables(costs)
            if self._job.shape.is_tied:
                # A stage that holds all layers holds and updates the shared matrix once.
                for name in ("optimizer_s", "params"):
                    tables[name][0, -1] -= getattr(costs[0], name)
        return self._known[key]

    def _layer_costs(self, kind: Kind, how: Recompute) -> list[StageCost]:
        group = self._job.cluster.group(kind.group)
        known: dict[object, StageCost] = {}
        costs: list[StageCost] = []
        for number, layer in enumerate(self._job.shape.layers):
            if layer not in known:
                chunk = Chunk(first=number, end=number + 1)
                stage = Stage(
                    group=group.name, first_device=0, chunks=(chunk,), tp=kind.tp, recompute=how
                )
                known[layer] = self._book.stage(group.chip, stage)
            costs.append(known[layer])
        return costs


def run_sums(values: NDArray[np.float64]) -> Table:
    """Return the sums [a, e] of values a … e - 1."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return sums[None, :] - sums[:, None]


def _run_tables(costs: Sequence[StageCost]) -> dict[str, Table]:
    """Return tables [a, e] of sums over layers a … e - 1 (the largest for working bytes).

    Runs without a layer are infinite in `busy_s`: a stage holds at least one.
    """
    found: dict[str, Table] = {}
    size = len(costs) + 1
    empty = np.tril(np.ones((size, size), dtype=bool))
    for name in ("busy_s", "forward_s", "weight_s", "optimizer_s", "params", "kept_bytes"):
        sums = np.concatenate([[0.0], np.cumsum([getattr(cost, name) for cost in costs])])
        # Rounded, so that like runs at different places compare as equal.
        runs = sums[None, :] - sums[:, None]
        scale = max(sums[-1], 1e-300)
        found[name] = np.round(runs / scale, 12) * scale
    found["busy_s"][empty] = np.inf
    working = np.zeros((size, size))
    for first in range(size - 1):
        row = np.array([cost.working_bytes for cost in costs[first:]])
        working[first, first + 1 :] = np.maximum.accumulate(row)
    found["working_bytes"] = working
    return found
