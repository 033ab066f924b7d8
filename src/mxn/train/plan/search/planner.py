"""The search for a plan: options in order of promise, the best drafts judged. Start at `search`.

Small pools are searched exactly, large ones by families of plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from mxn.errors import CapacityError, UserError
from mxn.train.plan.cluster import Cluster, DeviceGroup
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.profile import Profiles
from mxn.train.plan.search.choices import Found, Limits
from mxn.train.plan.search.exact import exact_drafts, is_small
from mxn.train.plan.search.judge import Judge
from mxn.train.plan.search.tables import Job, Kind, Tables
from mxn.train.plan.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Choice:
    """A micro-batch and a kind of slot for each group; `bound_s`: no plan of it is quicker."""

    micro_batch: int
    kinds: tuple[Kind, ...]
    bound_s: float


def search(
    shape: ModelShape,
    rows: int,
    cluster: Cluster,
    profiles: Profiles,
    *,
    memory: MemoryModel | None = None,
    limits: Limits | None = None,
) -> Found:
    """Return the quickest plan for steps of `rows` rows, with runners-up and what was refused.

    Raises: CapacityError when no plan fits into memory; UserError when nothing is profiled that the
    job could use, or a link is missing.
    """
    limits = limits or Limits()
    job = Job(
        shape=shape, cluster=cluster, profiles=profiles, memory=memory or MemoryModel(),
        recompute=limits.recompute,
    )  # fmt: skip
    _check(job, rows)
    judge = Judge(job, rows, limits)
    choices = sorted(_choices(job, rows, limits), key=lambda c: (c.bound_s, c.micro_batch, c.kinds))
    if not choices:
        raise UserError(
            f"no micro-batch that divides {rows} rows is profiled on every chip",
            hint="profile more sizes with `mxn train profile`",
        )
    for choice in choices:
        if choice.bound_s >= judge.best_s():
            break
        _search_small(job, rows, limits, choice, judge)
    return judge.finish(is_exact=True)


def _check(job: Job, rows: int) -> None:
    if rows < 1:
        raise UserError(f"a step has at least 1 row, got {rows}")
    for group in job.cluster.groups:
        if group.chip not in job.profiles:
            known = ", ".join(sorted(job.profiles))
            raise UserError(
                f"chip {group.chip!r} of group {group.name!r} has no profile",
                hint=f"profile it with `mxn train profile`; there are: {known}",
            )


def _choices(job: Job, rows: int, limits: Limits) -> Iterator[Choice]:
    for micro_batch in _micro_batches(job, rows, limits):
        options = [_kinds(job, group, micro_batch, limits) for group in job.cluster.groups]
        usable = [of for of in options if of]
        if not usable:
            continue
        tables = Tables(job, micro_batch)
        for kinds in product(*usable):
            rate = sum(job.num_slots(kind) / tables.work_s(kind) for kind in kinds)
            yield Choice(micro_batch, kinds, rows // micro_batch / rate)


def _micro_batches(job: Job, rows: int, limits: Limits) -> list[int]:
    if limits.micro_batches is not None:
        for size in limits.micro_batches:
            if size < 1 or rows % size:
                raise UserError(f"micro-batches of {size} rows do not divide {rows} rows")
        return sorted(limits.micro_batches)
    sizes = {micro_batch for p in job.profiles.values() for _, micro_batch, _ in p.costs}
    return sorted(size for size in sizes if rows % size == 0)


def _kinds(job: Job, group: DeviceGroup, micro_batch: int, limits: Limits) -> list[Kind]:
    widths = {tp for _, size, tp in job.profiles[group.chip].costs if size == micro_batch}
    most = min(group.devices_per_node, group.num_devices)
    return [
        kind
        for tp in sorted(widths)
        if tp <= most and (limits.tps is None or tp in limits.tps)
        if job.is_profiled(kind := Kind(group.name, tp), micro_batch)
    ]


def _search_small(job: Job, rows: int, limits: Limits, choice: Choice, judge: Judge) -> None:
    counts = tuple(job.num_slots(kind) for kind in choice.kinds)
    if not is_small(counts, job.shape.num_layers):
        raise CapacityError(f"{counts} slots are too many for an exact search")
    micro_batches = rows // choice.micro_batch
    for shards in _shards(job, choice, sum(counts), limits):
        tables = Tables(job, choice.micro_batch, shards)
        drafts = exact_drafts(
            tables, choice.kinds, counts, micro_batches, max_stages=limits.max_stages
        )
        judge.look(drafts)


def _shards(job: Job, choice: Choice, num_slots: int, limits: Limits) -> list[int]:
    """Return the numbers of optimizer shards to look at: 1 alone where there is memory enough."""
    if not limits.may_shard_optimizer or num_slots < 2:
        return [1]
    plain = Tables(job, choice.micro_batch)
    tight = any(
        (plain.bytes(kind, "none", num_slots) > job.cluster.group(kind.group).memory_bytes).any()
        for kind in choice.kinds
    )
    return [1, *range(2, num_slots + 1)] if tight else [1]
