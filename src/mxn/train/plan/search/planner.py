"""The search for a plan: options in order of promise, the best drafts judged. Start at `search`.

All pools are searched by families of plans; small ones exactly after that.
"""

from __future__ import annotations

from mxn.errors import UserError
from mxn.train.plan.cluster import Cluster
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.profile import Profiles
from mxn.train.plan.search.choices import Found, Limits
from mxn.train.plan.search.exact import is_small
from mxn.train.plan.search.judge import Judge
from mxn.train.plan.search.nearest import nearest
from mxn.train.plan.search.order import exact_search, guided_search, pools_of
from mxn.train.plan.search.refusal import no_plan
from mxn.train.plan.search.tables import Job, TableBook
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
    limits = limits or Limits()
    job = Job(
        shape=shape, cluster=cluster, profiles=profiles, memory=memory or MemoryModel(),
        recompute=limits.recompute,
    )  # fmt: skip
    _check(job, rows)
    book = TableBook(job)
    judge = Judge(book, rows, limits)
    pools = pools_of(job, rows, limits)
    if not pools:
        raise UserError(
            f"no micro-batch that divides {rows} rows is profiled on any chip",
            hint="profile more sizes with `mxn train profile`",
        )
    guided_search(book, rows, limits, pools, judge)
    is_exact = False
    if all(is_small(pool.most_slots(job), shape.num_layers) for pool in pools):
        is_exact = exact_search(book, rows, limits, pools, judge)
    found = judge.finish(is_exact=is_exact)
    if found is None:
        near = nearest(book, rows, limits, pools)
        found = judge.accept(near.plan) if near and near.share <= 1 else None
        if found is None:
            raise no_plan(job, limits, near)
    return found


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
