"""Small pools: every order, every cut, every set of pipelines. Start at `exact_drafts`.

Exact in the time of the pipelines (sum + (m - 1)·slowest) plus an estimate of what follows them;
`judge` then looks at each draft with the full predictor. Knows nothing of devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from math import prod

from mxn.train.plan.cluster import Cluster, Link
from mxn.train.plan.search.columns import Kind
from mxn.train.plan.search.cuts import Counts, Cut, Table, fronts
from mxn.train.plan.search.draft import Draft, Style, Template, template
from mxn.train.plan.search.every import partitions
from mxn.train.plan.search.packing import Option, pack, soonest
from mxn.train.plan.search.tables import Tables

_SMALL = 1000  # a millisecond each, about
_SLOW_HOP = 0.05  # of a stage's time
_MOST_SETS = 250  # of pipelines that are estimated
_NUM_SETS = 16  # of them, the quickest, that are judged


def effort_of(num_slots: Counts, num_layers: int) -> float:
    """Return how much work it is to try everything: states of the program, kinds squared."""
    return prod(n + 1 for n in num_slots) * len(num_slots) ** 2 * (num_layers / 26) ** 2


def is_small(num_slots: Counts, num_layers: int) -> bool:
    """Return whether trying everything for one choice of widths takes about a second at most."""
    return effort_of(num_slots, num_layers) <= _SMALL


def exact_drafts(
    tables: Tables,
    kinds: Sequence[Kind],
    num_slots: Counts,
    micro_batches: int,
    *,
    max_stages: int | None = None,
    worth_s: float = float("inf"),
    styles: Sequence[Style] = (Style(),),
) -> list[Draft]:
    """Return the best sets of pipelines: one alone, copies of one, any mix, by depth.

    What would take more than `worth_s` is left out. Drafts are for the first of `styles` and for
    the one that fills its pipelines best.
    """
    drafts: list[Draft] = []
    for hidden in (0.0, 0.5) if _has_slow_hops(tables, kinds) else (0.0,):
        found = _fronts(tables, kinds, num_slots, micro_batches, max_stages, worth_s, hidden)
        for style in dict.fromkeys((styles[0], min(styles, key=lambda style: style.fill))):
            args = (tables, kinds, num_slots, micro_batches, found, style)
            drafts += [*_alone(*args), *_copies(*args), *_mixes(*args, worth_s)]
            if style is styles[0] and tables.shards == 1:
                drafts += _sets(*args)
    # Each pipeline keeps a shard, so fewer pipelines would not fit as the tables say.
    return [draft for draft in drafts if draft.num_pipelines >= tables.shards]


def _has_slow_hops(tables: Tables, kinds: Sequence[Kind]) -> bool:
    """Return whether handing over takes a share of a stage's time that matters for cuts."""
    hops = max(float(tables.hop(a, b).max()) for a in kinds for b in kinds)
    num_slots = sum(tables.job.num_slots(kind) for kind in kinds)
    return hops * num_slots > _SLOW_HOP * min(map(tables.work_s, kinds))


def _fronts(
    tables: Tables, kinds: Sequence[Kind], num_slots: Counts, count: int, max_stages: int | None,
    worth_s: float, hidden: float,
) -> dict[Counts, list[Cut]]:  # fmt: skip
    """Return the fronts where a part of each hop is `hidden` from the pace, not from the filling.

    Two neighbours go round once in two micro-batches, so half of the hop between them is.
    """

    def hop(kind: int, after: int) -> Table:
        return tables.hop(kinds[kind], kinds[after])

    found = fronts(
        num_slots,
        lambda kind, at: tables.busy(kinds[kind], min(at + 1, count)),
        lambda kind, after: hop(kind, after) * (1 - hidden),
        max_stages=max_stages,
        limit_s=worth_s,
    )
    if not hidden:
        return found

    def whole(cut: Cut) -> Cut:
        borders = zip(pairwise(cut.kinds), cut.bounds[1:-1], strict=True)
        more = sum(float(hop(a, b)[at]) for (a, b), at in borders)
        return replace(cut, sum_s=cut.sum_s + hidden * more)

    return {slots: [whole(cut) for cut in cuts] for slots, cuts in found.items()}


def _alone(
    tables: Tables, kinds: Sequence[Kind], num_slots: Counts, count: int,
    found: dict[Counts, list[Cut]], style: Style,
) -> Iterator[Draft]:  # fmt: skip
    """One pipeline: no gradients are summed."""
    lines = [
        template(kinds, cut, tables.after_s(kinds, cut, []))
        for cuts in found.values()
        for cut in cuts
    ]
    lines.sort(key=lambda line: line.pace(style.fill).time_s(count))
    by_depth = {line.num_stages: line for line in reversed(lines)}
    for line in dict.fromkeys((*lines[:4], *by_depth.values())):
        yield _draft(
            tables, [(line, 1)], line.pace(style.fill).time_s(count), "one pipeline", style
        )


def _copies(
    tables: Tables, kinds: Sequence[Kind], num_slots: Counts, count: int,
    found: dict[Counts, list[Cut]], style: Style,
) -> Iterator[Draft]:  # fmt: skip
    """Copies of one pipeline: each layer's gradients stay within a group."""
    drafts: list[Draft] = []
    for slots, cuts in found.items():
        times = min(n // take for n, take in zip(num_slots, slots, strict=True) if take)
        times = min(times, count)
        if times < 2:
            continue
        link = _inner(tables.job.cluster, kinds, slots)
        for cut in cuts:
            line = template(kinds, cut, tables.after_s(kinds, cut, [link]))
            seconds = soonest([([line.pace(style.fill)], times)], count)
            drafts.append(_draft(tables, [(line, times)], seconds, "copies of one pipeline", style))
    drafts.sort(key=lambda draft: draft.estimate_s)
    yield from drafts[:4]


def _mixes(
    tables: Tables, kinds: Sequence[Kind], num_slots: Counts, count: int,
    found: dict[Counts, list[Cut]], style: Style, worth_s: float,
) -> Iterator[Draft]:  # fmt: skip
    """Any set of pipelines, for each limit on their depth, with gradient sums dear and free."""
    link = _outer(tables.job.cluster, kinds, num_slots)
    for links in ([link], []):
        rows: dict[Counts, list[Template]] = {
            slots: [template(kinds, cut, tables.after_s(kinds, cut, links)) for cut in cuts]
            for slots, cuts in found.items()
        }
        yield from _packed(tables, rows, num_slots, count, style, worth_s)


def _sets(
    tables: Tables, kinds: Sequence[Kind], num_slots: Counts, count: int,
    found: dict[Counts, list[Cut]], style: Style,
) -> Iterator[Draft]:  # fmt: skip
    """The quickest of all sets of pipelines, gradient sums left to the judge."""
    rows = {s: [template(kinds, cut, 0.0) for cut in cuts] for s, cuts in found.items()}
    paces = {slots: tuple(t.pace(style.fill) for t in of) for slots, of in rows.items()}
    drafts: list[Draft] = []
    for chosen in islice(partitions(num_slots, sorted(rows)), _MOST_SETS):
        if not 1 < sum(chosen.values()) <= count:
            continue
        seconds = soonest([(paces[slots], num) for slots, num in chosen.items()], count)
        lines = [
            (max(rows[slots], key=lambda t: t.pace(style.fill).done_in(seconds)), num)
            for slots, num in chosen.items()
        ]
        drafts.append(_draft(tables, lines, seconds, "mix of pipelines", style))
    drafts.sort(key=lambda draft: draft.estimate_s)
    yield from drafts[:_NUM_SETS]


def _packed(
    tables: Tables, rows: dict[Counts, list[Template]], num_slots: Counts, count: int,
    style: Style, worth_s: float,
) -> Iterator[Draft]:  # fmt: skip
    deepest = max((sum(slots) for slots in rows), default=0)
    for depth in sorted({1, 2, 3, deepest}):
        allowed = [slots for slots in rows if sum(slots) <= depth]
        if not any(sum(slots) == depth for slots in allowed):
            continue
        options = [
            Option(slots, tuple(t.pace(style.fill) for t in rows[slots])) for slots in allowed
        ]
        seconds, used = pack(num_slots, options, count, worth_s=worth_s)
        if not used:
            continue
        lines = [
            (max(rows[slots], key=lambda t: t.pace(style.fill).done_in(seconds)), times)
            for slots, times in zip(allowed, used, strict=True)
            if times
        ]
        if lines:
            yield _draft(tables, lines, seconds, "mix of pipelines", style)


def _draft(
    tables: Tables, lines: Sequence[tuple[Template, int]], seconds: float, origin: str, style: Style
) -> Draft:
    return Draft(tables.micro_batch, tuple(lines), seconds, origin, tables.shards > 1, style)


def _inner(cluster: Cluster, kinds: Sequence[Kind], slots: Counts) -> Link:
    """Return the slowest link inside the groups that have slots here."""
    groups = [cluster.group(k.group) for k, n in zip(kinds, slots, strict=True) if n]
    links = [g.group_link if g.num_nodes > 1 else g.node_link for g in groups]
    return max(links, key=lambda link: link.transfer_s(1e9))


def _outer(cluster: Cluster, kinds: Sequence[Kind], slots: Counts) -> Link:
    """Return the slowest link of all, between groups too."""
    names = [k.group for k, n in zip(kinds, slots, strict=True) if n]
    links = [cluster.link(a, 0, b, 0) for i, a in enumerate(names) for b in names[i + 1 :]]
    return max([_inner(cluster, kinds, slots), *links], key=lambda link: link.transfer_s(1e9))
