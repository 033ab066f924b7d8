"""The search for a plan: options in order of promise, the best drafts judged. Start at `search`.

All pools are searched by families of plans; small ones exactly after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mxn.errors import UserError
from mxn.train.plan.cluster import Cluster
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.profile import Profiles
from mxn.train.plan.search.choices import Found, Limits
from mxn.train.plan.search.columns import Job
from mxn.train.plan.search.exact import is_small
from mxn.train.plan.search.judge import Judge
from mxn.train.plan.search.nearest import nearest
from mxn.train.plan.search.order import Pool, exact_search, guided_search, pools_of
from mxn.train.plan.search.refusal import no_plan
from mxn.train.plan.search.tables import TableBook
from mxn.train.plan.shape import ModelShape


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

    Raises: CapacityError when no plan fits into memory, with the nearest one and what would help;
    UserError when nothing is profiled that the job could use, or a link is missing.
    """
    asked = _ask(shape, rows, cluster, profiles, memory, limits or Limits())
    found = _run(asked)
    if found is None:
        near = nearest(asked.book, rows, asked.limits, asked.pools)
        found = asked.judge.accept(near.plan) if near and near.share <= 1 else None
        if found is None:
            raise no_plan(asked.book.job, asked.limits, near)
    return found


def find(
    shape: ModelShape,
    rows: int,
    cluster: Cluster,
    profiles: Profiles,
    *,
    memory: MemoryModel | None = None,
    limits: Limits | None = None,
) -> Found | None:
    """Return what `search` does, and None where nothing fits: for who needs no reasons.

    Those take a search of their own. Raises: UserError as `search`.
    """
    return _run(_ask(shape, rows, cluster, profiles, memory, limits or Limits()))


@dataclass(frozen=True, slots=True)
class _Asked:
    """A search that may begin."""

    book: TableBook
    rows: int
    limits: Limits
    pools: Sequence[Pool]
    judge: Judge


def _ask(
    shape: ModelShape,
    rows: int,
    cluster: Cluster,
    profiles: Profiles,
    memory: MemoryModel | None,
    limits: Limits,
) -> _Asked:
    job = Job(
        shape=shape, cluster=cluster, profiles=profiles, memory=memory or MemoryModel(),
        recompute=limits.recompute,
    )  # fmt: skip
    _check(job, rows)
    book = TableBook(job)
    pools = pools_of(job, rows, limits)
    if not pools:
        raise UserError(
            f"no micro-batch that divides {rows} rows is profiled on any chip",
            hint="profile more sizes with `mxn train profile`",
        )
    return _Asked(book, rows, limits, pools, Judge(book, rows, limits))


def _run(asked: _Asked) -> Found | None:
    book, rows, limits, pools, judge = (
        asked.book, asked.rows, asked.limits, asked.pools, asked.judge,
    )  # fmt: skip
    guided_search(book, rows, limits, pools, judge)
    is_exact = False
    num_layers = book.job.shape.num_layers
    if all(is_small(pool.most_slots(book.job), num_layers) for pool in pools):
        is_exact = exact_search(book, rows, limits, pools, judge)
    return judge.finish(is_exact=is_exact)


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
