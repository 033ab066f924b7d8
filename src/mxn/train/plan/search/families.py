"""Large pools: sets of pipelines by family, each pipeline cut exactly. Start at `Families.drafts`.

Groups are put into parts; the pipelines of a part run over all of its groups, their slots dealt out
as evenly as they go. One part with everything is the family of crossing pipelines, a part for each
group the family of mixed data parallelism; everything between is tried too. What slots a part
cannot use, another family of pipelines made from left-overs does.

Knows nothing of devices; times are those of `Template`, an estimate that `judge` checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from mxn.train.plan.cluster import Link
from mxn.train.plan.search.cuts import Counts, best_in_order
from mxn.train.plan.search.draft import Draft, Template, template
from mxn.train.plan.search.packing import soonest
from mxn.train.plan.search.tables import Kind, Tables

Sets = tuple[tuple[tuple[Template, ...], int], ...]
"""Ways to run a pipeline, and how many pipelines are like it."""

_DEPTHS = 8  # how many depths of a part are tried, from the shallowest that fits
_WHOLE_LATTICE = 6  # up to so many groups every subset is a part


@dataclass(frozen=True, slots=True)
class Part:
    """Pipelines over some groups; `members` are their numbers."""

    members: frozenset[int]
    sets: Sets

    def done_in(self, seconds: float) -> int:
        return sum(n * max(t.pace.done_in(seconds) for t in ways) for ways, n in self.sets)


class Families:
    """Sets of pipelines for one micro-batch, one kind of slot per group, one number of shards."""

    def __init__(
        self,
        tables: Tables,
        kinds: Sequence[Kind],
        micro_batches: int,
        *,
        max_stages: int | None = None,
    ) -> None:
        self._tables = tables
        self._kinds = tuple(kinds)
        self._micro_batches = micro_batches
        self._slots = tuple(tables.job.num_slots(kind) for kind in kinds)
        self._max_stages = min(max_stages or 64, tables.job.shape.num_layers)
        self._ways: dict[tuple[Counts, bool], tuple[Template, ...]] = {}
        self._parts: dict[frozenset[int], list[Part]] = {}

    def simple(self) -> list[Draft]:
        """Return the two pure families and each group alone: a quick look."""
        every = range(len(self._kinds))
        guess = self._bound_s() * 1.1
        parts = [self._best(frozenset([g]), guess) for g in every]
        drafts = [self._draft([part for part in parts if part], "pipelines inside groups")]
        for part in self._part(frozenset(every)):
            drafts.append(self._draft([part], "pipelines across groups"))
        return sorted((d for d in drafts if d), key=lambda draft: draft.estimate_s)

    def drafts(self) -> list[Draft]:
        """Return the best draft for each number of parts, and those with left-overs pooled."""
        found: dict[tuple[int, str], Draft] = {}
        guess = self._bound_s() * 1.1
        for _ in range(2):
            for draft in self._round(guess):
                key = (len(draft.lines), draft.origin)
                if key not in found or draft.estimate_s < found[key].estimate_s:
                    found[key] = draft
            guess = min((d.estimate_s for d in found.values()), default=guess)
        return sorted(found.values(), key=lambda draft: draft.estimate_s)

    def rate(self, guess: float) -> float:
        """Return how many micro-batches a second the first group does alone; 0: it cannot."""
        part = self._best(frozenset([0]), guess)
        return part.done_in(guess) / guess if part else 0.0

    def _round(self, guess: float) -> Iterator[Draft]:
        for parts in _partitions(self._subsets(), self._best_of(guess), guess, len(self._kinds)):
            crossing = any(len(part.members) > 1 for part in parts)
            name = "pipelines across groups" if crossing else "pipelines inside groups"
            if crossing and len(parts) > 1:
                name = "pipelines inside and across groups"
            draft = self._draft(parts, name)
            if draft is not None:
                yield draft
        yield from self._pooled(guess)

    def _bound_s(self) -> float:
        """Return the time of a step if nothing but compute took any."""
        pairs = zip(self._slots, self._kinds, strict=True)
        return self._micro_batches / sum(n / self._tables.work_s(kind) for n, kind in pairs)

    def _subsets(self) -> list[frozenset[int]]:
        every = range(len(self._kinds))
        sizes = range(1, len(self._kinds) + 1)
        if len(self._kinds) > _WHOLE_LATTICE:
            sizes = [1, 2, len(self._kinds)]
        return [frozenset(chosen) for size in sizes for chosen in combinations(every, size)]

    def _best_of(self, guess: float) -> dict[frozenset[int], Part]:
        found = ((members, self._best(members, guess)) for members in self._subsets())
        return {members: part for members, part in found if part}

    def _best(self, members: frozenset[int], guess: float) -> Part | None:
        return max(self._part(members), key=lambda part: part.done_in(guess), default=None)

    def _part(self, members: frozenset[int]) -> list[Part]:
        """Return the part at each depth that is worth a look."""
        if members not in self._parts:
            slots = tuple(n if g in members else 0 for g, n in enumerate(self._slots))
            self._parts[members] = [Part(members, sets) for sets in self._depths(slots)]
        return self._parts[members]

    def _depths(self, slots: Counts) -> Iterator[Sets]:
        total, seen, tried = sum(slots), set(), 0
        for depth in range(self._shallowest(slots), min(self._max_stages, total) + 1):
            num = min(total // depth, self._micro_batches)
            if num in seen or tried == _DEPTHS:
                continue
            seen.add(num)
            found = [self._sets(dealt) for dealt in self._deals(slots, num)]
            yield from (sets for sets in found if sets)
            tried += any(found)

    def _shallowest(self, slots: Counts) -> int:
        """Return a depth below which the model cannot fit, whatever the cut."""
        share = sum(
            n * limit / self._whole_bytes(kind)
            for n, kind in zip(slots, self._kinds, strict=True)
            if n
            for limit in [self._tables.job.cluster.group(kind.group).memory_bytes]
        )
        return max(1, int(sum(slots) / share))

    def _whole_bytes(self, kind: Kind) -> float:
        table = self._tables.bytes(kind, self._tables.job.recompute[-1], 1)
        return float(table[0, -1])

    def _deals(self, slots: Counts, num: int) -> Iterator[Counter[Counts]]:
        """Deal slots to `num` pipelines: all of them as evenly as they go, and only like shares."""
        rows = [[0] * len(slots) for _ in range(num)]
        speed = [0.0] * num
        fastest = sorted(range(len(slots)), key=lambda g: (self._tables.work_s(self._kinds[g]), g))
        for g in fastest:
            each, rest = divmod(slots[g], num)
            order = sorted(range(num), key=lambda p: (speed[p], p))
            for place, p in enumerate(order):
                rows[p][g] = each + (place < rest)
                speed[p] += rows[p][g] / self._tables.work_s(self._kinds[g])
        dealt = Counter(tuple(row) for row in rows)
        yield dealt
        alike = tuple(n // num for n in slots)
        if len(dealt) > 1 and any(alike):
            yield Counter({alike: num})

    def _sets(self, dealt: Counter[Counts]) -> Sets:
        """Return pipelines for dealt slots; those that cannot hold the model are left out."""
        several = sum(dealt.values()) > 1
        pairs = ((self._lines(counts, several), num) for counts, num in sorted(dealt.items()))
        return tuple((ways, num) for ways, num in pairs if ways)

    def _lines(self, counts: Counts, several: bool) -> tuple[Template, ...]:
        key = (counts, several)
        if key not in self._ways:
            ways = [t for order in self._orders(counts) for t in self._cut(order, several)]
            self._ways[key] = tuple(_undominated(ways))
        return self._ways[key]

    def _orders(self, counts: Counts) -> Iterator[tuple[int, ...]]:
        """Groups stay together; first those with most memory for their speed, then the reverse."""
        used = [g for g, n in enumerate(counts) if n]
        cluster = self._tables.job.cluster
        used.sort(
            key=lambda g: (
                -cluster.group(self._kinds[g].group).memory_bytes
                * self._kinds[g].tp
                * self._tables.work_s(self._kinds[g]),
                g,
            )
        )
        for row in (used, used[::-1])[: min(len(used), 2)]:
            yield tuple(g for g in row for _ in range(counts[g]))

    def _cut(self, order: tuple[int, ...], several: bool) -> list[Template]:
        if len(order) > self._max_stages:
            return []
        kinds = [self._kinds[g] for g in order]
        size = len(order)
        busy = [
            self._tables.busy(kind, min(size - s, self._micro_batches))
            for s, kind in enumerate(kinds)
        ]
        hops = [self._tables.hop(a, b) for a, b in pairwise(kinds)]
        link = self._link(order) if several else None
        return [
            template(self._kinds, cut, self._tables.after_s(self._kinds, cut, link))
            for cut in best_in_order(order, busy, hops)
        ]

    def _link(self, order: tuple[int, ...]) -> Link:
        """Return the slowest link inside the groups: like stages sum their gradients there."""
        groups = [self._tables.job.cluster.group(self._kinds[g].group) for g in sorted(set(order))]
        links = [g.group_link if g.num_nodes > 1 else g.node_link for g in groups]
        return max(links, key=lambda link: link.transfer_s(1e9))

    def _pooled(self, guess: float) -> Iterator[Draft]:
        """Pipelines inside groups at their most efficient depth, and one family of left-overs."""
        sets: list[tuple[tuple[Template, ...], int]] = []
        left = list(self._slots)
        for g in range(len(self._kinds)):
            best = self._efficient(g, guess)
            if best is None:
                continue
            ways, num = best
            sets.append((ways, num))
            left[g] -= num * ways[0].num_stages
        if not sum(left):
            return
        for extra in self._depths(tuple(left)):
            draft = self._draft_of((*sets, *extra), "pipelines inside groups, left-overs across")
            if draft is not None:
                yield draft

    def _efficient(self, g: int, guess: float) -> tuple[tuple[Template, ...], int] | None:
        """Return the pipeline inside a group that does most per slot, and how many there can be."""
        one_group = tuple(n if i == g else 0 for i, n in enumerate(self._slots))
        first = self._shallowest(one_group)
        best: tuple[float, tuple[tuple[Template, ...], int] | None] = (0.0, None)
        for depth in range(first, min(first + 2 * _DEPTHS, self._max_stages, self._slots[g]) + 1):
            ways = self._lines(tuple(depth if i == g else 0 for i in range(len(self._slots))), True)
            if ways:
                rate = max(t.pace.done_in(guess) for t in ways) / depth
                if rate > best[0]:
                    best = (rate, (ways, self._slots[g] // depth))
        return best[1]

    def _draft(self, parts: Sequence[Part], origin: str) -> Draft | None:
        return self._draft_of(tuple(s for part in parts for s in part.sets), origin)

    def _draft_of(self, sets: Sets, origin: str) -> Draft | None:
        if not sets or sum(num for _, num in sets) < self._tables.shards:
            return None
        paces = [(tuple(t.pace for t in ways), num) for ways, num in sets]
        seconds = soonest(paces, self._micro_batches)
        lines = tuple(
            (max(ways, key=lambda t: t.pace.done_in(seconds)), num)
            for ways, num in sets
            if max(t.pace.done_in(seconds) for t in ways)
        )
        sharded = self._tables.shards > 1
        return Draft(self._tables.micro_batch, lines, seconds, origin, sharded)


def _undominated(ways: list[Template]) -> list[Template]:
    """Return those that no other beats in both start and pace."""
    ways.sort(key=lambda t: (t.pace.each_s, t.pace.start_s))
    kept: list[Template] = []
    for way in ways:
        if not kept or way.pace.start_s < kept[-1].pace.start_s:
            kept.append(way)
    return kept


def _partitions(
    subsets: Sequence[frozenset[int]], parts: dict[frozenset[int], Part], guess: float, num: int
) -> list[list[Part]]:
    """Return for each number of parts the disjoint parts that do most within `guess` seconds."""
    value = {members: parts[members].done_in(guess) for members in subsets if members in parts}
    # best[k][covered groups]: the most done by k disjoint parts. A group may stay unused.
    best: list[dict[frozenset[int], tuple[int, list[Part]]]] = [{frozenset(): (0, [])}]
    for _ in range(num):
        level: dict[frozenset[int], tuple[int, list[Part]]] = {}
        for covered, (done, chosen) in best[-1].items():
            for members, more in value.items():
                # Parts in order of their first group, so that each partition is met once.
                if members & covered or (chosen and min(members) < min(chosen[-1].members)):
                    continue
                union = members | covered
                if union not in level or done + more > level[union][0]:
                    level[union] = (done + more, [*chosen, parts[members]])
        best.append(level)
    tops = (max(level.values(), key=lambda e: e[0], default=None) for level in best[1:])
    return [top[1] for top in tops if top]
