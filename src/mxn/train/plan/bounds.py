"""How fast a mixed pool could be at most, in two readings; a ratio to either is always given both
ways. Start at `bounds`.

U  = sum over groups of n_g · tau_g: tau_g is the throughput per device of the same model's best
     plan on devices of this group alone. A mixed plan can pass it where a group alone is short of
     memory and pays for that.
U' = sum of the devices' compute rates: no bubble, no link, nothing recomputed. A plan passes it
     only where layers suit chips differently, and each chip gets those that it does best.

R = T / U is what papers call the share of the upper bound; R' = T / U' is the stricter one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mxn.errors import UserError
from mxn.train.plan.cluster import Cluster, DeviceGroup
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.profile import Profiles
from mxn.train.plan.search.choices import Candidate, Limits
from mxn.train.plan.search.columns import Job
from mxn.train.plan.search.order import pools_of
from mxn.train.plan.search.planner import find
from mxn.train.plan.search.tables import TableBook
from mxn.train.plan.shape import ModelShape

_MOST_TIMES = 64  # a group too small for the model is multiplied by up to this


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBound:
    """One group alone. Rates are tokens per second of one device."""

    group: str
    num_devices: int
    alone: float | None  # tau_g; None: the model fits into no pool of this chip that was tried
    compute: float
    times: int = 1  # the group was taken so many times as large, because the model needs it
    rows: int = 0  # of a step of the group alone
    best: Candidate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    groups: tuple[GroupBound, ...]

    @property
    def tokens_per_s(self) -> float | None:
        """U; None when a group has no tau."""
        total = 0.0
        for group in self.groups:
            if group.alone is None:
                return None
            total += group.num_devices * group.alone
        return total

    @property
    def compute_tokens_per_s(self) -> float:
        """U'."""
        return sum(group.num_devices * group.compute for group in self.groups)

    def ratios(self, tokens_per_s: float) -> tuple[float | None, float]:
        """Return R (None: U is unknown) and R'."""
        bound = self.tokens_per_s
        ratio = None if bound is None else tokens_per_s / bound
        return ratio, tokens_per_s / self.compute_tokens_per_s


def bounds(
    shape: ModelShape,
    rows: int,
    cluster: Cluster,
    profiles: Profiles,
    *,
    memory: MemoryModel | None = None,
    limits: Limits | None = None,
    share_batch: bool = False,
) -> Bounds:
    """Return both bounds of a pool.

    Each group alone does steps of `rows` rows, as the whole pool does; with `share_batch` only the
    part of them that its compute rate is of the pool's, which gives a lower U.
    Raises: UserError when nothing is profiled that a group could use.
    """
    limits = limits or Limits()
    rates = compute_rates(shape, rows, cluster, profiles, memory=memory, limits=limits)
    total = sum(group.num_devices * rates[group.name] for group in cluster.groups)
    found: list[GroupBound] = []
    for group in cluster.groups:
        part = group.num_devices * rates[group.name] / total if share_batch else 1.0
        own = _rows_of(rows, part, shape, group, profiles, limits)
        found.append(_alone(shape, own, group, profiles, memory, limits, rates[group.name]))
    return Bounds(groups=tuple(found))


def compute_rates(
    shape: ModelShape,
    rows: int,
    cluster: Cluster,
    profiles: Profiles,
    *,
    memory: MemoryModel | None = None,
    limits: Limits | None = None,
) -> Mapping[str, float]:
    """Return tokens per second of one device of each group, with its best widths and micro-batch.

    Raises: UserError when a group has no profile that could be used.
    """
    rates: dict[str, float] = {}
    for group in cluster.groups:
        job = _job(shape, group, profiles, memory)
        book = TableBook(job)
        rates[group.name] = max(
            (
                pool.micro_batch * shape.seq_tokens / (kind.tp * work_s)
                for pool in pools_of(job, rows, limits or Limits())
                for kind in pool.options[0]
                if (work_s := book.at(pool.micro_batch).work_s(kind))
            ),
            default=0.0,
        )
        if not rates[group.name]:
            raise UserError(
                f"group {group.name!r} has no profile at a micro-batch that divides {rows} rows",
                hint="profile more sizes with `mxn train profile`",
            )
    return rates


def _alone(
    shape: ModelShape,
    rows: int,
    group: DeviceGroup,
    profiles: Profiles,
    memory: MemoryModel | None,
    limits: Limits,
    compute: float,
) -> GroupBound:
    """Return a group's bound; a group in which the model does not fit is taken several times."""
    times = 1
    while times <= _MOST_TIMES:
        larger = replace(group, num_devices=group.num_devices * times)
        pool = Cluster(groups=(larger,))
        found = find(shape, rows, pool, profiles, memory=memory, limits=limits)
        if found is None:
            times *= 2
            continue
        return GroupBound(
            group=group.name, num_devices=group.num_devices, compute=compute, times=times,
            alone=found.best.prediction.tokens_per_s / larger.num_devices, rows=rows,
            best=found.best,
        )  # fmt: skip
    return GroupBound(
        group=group.name, num_devices=group.num_devices, compute=compute, alone=None, rows=rows
    )


def _rows_of(
    rows: int,
    part: float,
    shape: ModelShape,
    group: DeviceGroup,
    profiles: Profiles,
    limits: Limits,
) -> int:
    """Return about `part` of the rows, in whole micro-batches of the largest profiled size."""
    if part >= 1:
        return rows
    pools = pools_of(_job(shape, group, profiles, None), rows, limits)
    unit = max(pool.micro_batch for pool in pools)
    return max(unit, round(rows * part / unit) * unit)


def _job(
    shape: ModelShape, group: DeviceGroup, profiles: Profiles, memory: MemoryModel | None
) -> Job:
    return Job(
        shape=shape, cluster=Cluster(groups=(group,)), profiles=profiles,
        memory=memory or MemoryModel(),
    )  # fmt: skip
