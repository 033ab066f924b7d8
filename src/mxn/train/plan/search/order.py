"""In which order a search looks at micro-batches, tensor-parallel widths and optimizer shards.

Small pools: all of them, most promising first, until no bound is better than the best plan. Large
ones: each group's best widths, a quick look at both pure families for each choice, and a thorough
one at the best few. Start at `exact_search` and `guided_search`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from mxn.errors import UserError
from mxn.train.plan.cluster import DeviceGroup
from mxn.train.plan.experts import has_experts
from mxn.train.plan.search.choices import Limits
from mxn.train.plan.search.columns import Job, Kind
from mxn.train.plan.search.copies import alike
from mxn.train.plan.search.cuts import Counts
from mxn.train.plan.search.every import Every, is_countable
from mxn.train.plan.search.exact import effort_of, exact_drafts
from mxn.train.plan.search.families import Families
from mxn.train.plan.search.judge import Judge
from mxn.train.plan.search.rough import Rough, WaysOf
from mxn.train.plan.search.tables import TableBook
from mxn.train.plan.search.ways import Ways
from mxn.train.plan.shape import ModelShape

_MOST_EFFORT = 4000  # of an exact search; some seconds
_EXPERTS = (2, 4, 8, 16, 32, 64)
_SHARDS = (1, 8, 64)  # of a large pool's optimizer, as far as there are slots
_NUM_JUDGED = 6  # drafts of each origin that are predicted
_NUM_THOROUGH = 4  # choices of a large pool that get a thorough look


@dataclass(frozen=True, slots=True)
class Pool:
    """For one micro-batch: the kinds of slots that each group could have. Groups without any are
    left out."""

    micro_batch: int
    options: tuple[tuple[Kind, ...], ...]

    def most_slots(self, job: Job) -> Counts:
        return tuple(max(job.num_slots(kind) for kind in of) for of in self.options)


@dataclass(frozen=True, slots=True)
class Choice:
    """A kind of slot for each group; `bound_s`: no plan of it is quicker."""

    micro_batch: int
    kinds: tuple[Kind, ...]
    bound_s: float


def pools_of(job: Job, rows: int, limits: Limits) -> list[Pool]:
    """Return a pool for each micro-batch that could be used. Raises: UserError.""" ""
    found: list[Pool] = []
    for micro_batch in _micro_batches(job, rows, limits):
        options = (_kinds(job, group, micro_batch, limits) for group in job.cluster.groups)
        usable = tuple(of for of in options if of)
        if usable:
            found.append(Pool(micro_batch, usable))
    return found


def exact_search(
    book: TableBook, rows: int, limits: Limits, pools: Sequence[Pool], judge: Judge
) -> bool:
    """Look at every choice, most promising first, until no other could beat the best plan.

    Return whether each of them had so few devices that all its orders and cuts were timed; a pool
    with very many choices is given up on, which leaves the best of those that were looked at.
    """
    choices = [
        _choice(book, rows, pool.micro_batch, kinds)
        for pool in pools
        for kinds in product(*pool.options)
    ]
    effort, is_exact = 0.0, True
    for choice in sorted(choices, key=lambda c: (c.bound_s, c.micro_batch, c.kinds)):
        if choice.bound_s >= judge.best_s():
            return is_exact
        counts = tuple(book.job.num_slots(kind) for kind in choice.kinds)
        numbers = _all_shards(book, rows, choice, sum(counts), limits)
        for shards in numbers:
            effort += effort_of(counts, book.job.shape.num_layers)
            if effort > _MOST_EFFORT:
                return False
            judge.look(exact_drafts(
                book.at(choice.micro_batch, shards), choice.kinds, counts,
                rows // choice.micro_batch, max_stages=limits.max_stages,
                worth_s=judge.worth_s(), styles=limits.styles,
            ))  # fmt: skip
        is_exact &= _look_at_every(book, rows, limits, choice, counts, len(numbers) > 1, judge)
    return is_exact


def _look_at_every(
    book: TableBook, rows: int, limits: Limits, choice: Choice, counts: Counts, may_share: bool,
    judge: Judge,
) -> bool:  # fmt: skip
    """Time all orders and cuts of a choice under the schedules of one chunk.

    With `may_share` also with the optimizer shared out over any number of pipelines. Return whether
    they are few enough for that, and such a schedule is allowed.
    """
    styles = [style for style in limits.styles if style.chunks == 1]
    if not is_countable(counts, book.job.shape.num_layers, limits.max_stages):
        return False
    numbers = range(1, sum(counts) + 1) if may_share else (1,)
    for style, shards in product(styles, numbers):
        judge.look(Every(
            book.at(choice.micro_batch, shards), choice.kinds, counts,
            rows // choice.micro_batch, style, max_stages=limits.max_stages,
            worth_s=judge.worth_s(),
        ).drafts())  # fmt: skip
    return bool(styles)


def guided_search(
    book: TableBook, rows: int, limits: Limits, pools: Sequence[Pool], judge: Judge
) -> None:
    """Take a quick look at each choice, then a thorough one at the best few."""
    fill = min(style.fill for style in limits.styles)
    found: list[Rough] = []
    looks: list[tuple[float, int, Families]] = []
    makers = {
        pool.micro_batch: _ways_of(book, rows, pool.micro_batch, fill, limits) for pool in pools
    }
    for pool in pools:
        ways_of = makers[pool.micro_batch]
        for sharded in (False, True)[: 1 + limits.may_shard_optimizer]:
            for experts in _sharing(book.job.shape, limits):
                found += alike(ways_of, pool.options, sharded=sharded, experts=experts)
        for shards in _SHARDS if limits.may_shard_optimizer else _SHARDS[:1]:
            if shards > sum(pool.most_slots(book.job)):
                break
            for kinds in _promising(ways_of(shards, 1), pool):
                families = Families(ways_of(shards, 1), kinds)
                drafts = families.simple()
                if drafts:
                    looks.append((drafts[0].estimate_s, len(looks), families))
                    found += drafts
    for _, _, families in sorted(looks, key=lambda look: look[:2])[:_NUM_THOROUGH]:
        found += families.drafts()
    for rough in _best_of_each(found):
        judge.look(rough.exact(makers[rough.ways.tables.micro_batch], limits.styles))


def _ways_of(book: TableBook, rows: int, micro_batch: int, fill: float, limits: Limits) -> WaysOf:
    @cache
    def ways_of(shards: int, experts: int) -> Ways:
        tables = book.at(micro_batch, shards, experts)
        return Ways(tables, rows // micro_batch, fill=fill, max_stages=limits.max_stages)

    return ways_of


def _sharing(shape: ModelShape, limits: Limits) -> tuple[int, ...]:
    """Return how many pipelines may share the experts of a layer."""
    if not any(has_experts(layer) for layer in shape.layers):
        return (1,)
    return (1, *(count for count in _EXPERTS if count <= limits.max_expert_parallel))


def _best_of_each(found: Sequence[Rough]) -> list[Rough]:
    """Return the quickest of each origin: estimates of different kinds of plans err differently."""
    kept: list[Rough] = []
    for origin in dict.fromkeys(rough.origin for rough in found):
        like = sorted((r for r in found if r.origin == origin), key=lambda r: r.estimate_s)
        kept += like[:_NUM_JUDGED]
    return sorted(kept, key=lambda rough: rough.estimate_s)


def _promising(ways: Ways, pool: Pool) -> list[tuple[Kind, ...]]:
    """Return widths per group: the best for each alone, the second best, and the same for all."""
    tables, job = ways.tables, ways.tables.job
    rate = sum(max(job.num_slots(k) / tables.work_s(k) for k in of) for of in pool.options)
    guess = 1.1 * ways.micro_batches / rate
    ranked: list[list[Kind]] = []
    for of in pool.options:
        rates = {kind: Families(ways, [kind]).rate(guess) for kind in of}
        ranked.append(sorted(of, key=lambda kind: (-rates[kind], kind.tp)))
    found = [tuple(row[0] for row in ranked), tuple(row[min(1, len(row) - 1)] for row in ranked)]
    widths = sorted({kind.tp for of in pool.options for kind in of}, reverse=True)
    for tp in widths[:2]:
        found.append(tuple(min(of, key=lambda k: abs(k.tp - tp)) for of in pool.options))
    return list(dict.fromkeys(found))


def _choice(book: TableBook, rows: int, micro_batch: int, kinds: tuple[Kind, ...]) -> Choice:
    tables = book.at(micro_batch)
    rate = sum(book.job.num_slots(kind) / tables.work_s(kind) for kind in kinds)
    return Choice(micro_batch, kinds, rows // micro_batch / rate)


def _micro_batches(job: Job, rows: int, limits: Limits) -> list[int]:
    if limits.micro_batches is not None:
        for size in limits.micro_batches:
            if size < 1 or rows % size:
                raise UserError(f"micro-batches of {size} rows do not divide {rows} rows")
        return sorted(limits.micro_batches)
    sizes = {micro_batch for p in job.profiles.values() for _, micro_batch, _ in p.costs}
    return sorted(size for size in sizes if rows % size == 0)


def _kinds(job: Job, group: DeviceGroup, micro_batch: int, limits: Limits) -> tuple[Kind, ...]:
    widths = {tp for _, size, tp in job.profiles[group.chip].costs if size == micro_batch}
    most = min(group.devices_per_node, group.num_devices)
    return tuple(
        kind
        for tp in sorted(widths)
        if tp <= most and (limits.tps is None or tp in limits.tps)
        if job.is_profiled(kind := Kind(group.name, tp), micro_batch)
    )


def _all_shards(
    book: TableBook, rows: int, choice: Choice, num_slots: int, limits: Limits
) -> list[int]:
    """Return the numbers of optimizer shards to look at: 1 alone where there is memory enough."""
    if not limits.may_shard_optimizer or num_slots < 2:
        return [1]
    plain, count = book.at(choice.micro_batch), rows // choice.micro_batch
    cluster = book.job.cluster
    kept = max(
        style.in_flight(0, size, count)
        for style in limits.styles
        for size in range(1, num_slots + 1)
    )
    tight = any(
        (plain.bytes(kind, "none", kept) > cluster.group(kind.group).memory_bytes).any()
        for kind in choice.kinds
    )
    powers = [2**power for power in range(1, num_slots.bit_length())]
    return [1, *powers] if tight else [1]
