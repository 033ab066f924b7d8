"""Large pools: sets of pipelines by family. Start at `Families.drafts`.

Groups are put into parts; the pipelines of a part run over all of its groups, their slots dealt out
as evenly as they go. One part with everything is the family of crossing pipelines, a part for each
group that of mixed data parallelism; everything between is tried too. Slots that groups cannot use
alone are pooled for pipelines across.

Knows nothing of devices; times are rough until a set of pipelines is chosen, and `judge` has the
last word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from mxn.train.plan.search.columns import Kind
from mxn.train.plan.search.rough import Rough, Sets, draft_of, pace_of
from mxn.train.plan.search.ways import Way, Ways

Deal = Counter[tuple[tuple[Kind, int], ...]]
"""How many pipelines get which slots."""

_DEPTHS = 6  # how many depths of a part are tried, from the shallowest that fits
_WHOLE_LATTICE = 6  # up to so many groups every subset is a part


@dataclass(frozen=True, slots=True)
class Part:
    """Pipelines over some groups; `members` are their numbers."""

    members: frozenset[int]
    sets: Sets

    def done_in(self, seconds: float, crossing: bool) -> int:
        return sum(pace_of(way, crossing).done_in(seconds) * n for way, n in self.sets)


class Families:
    """Sets of pipelines with one kind of slot for each group."""

    def __init__(self, ways: Ways, kinds: Sequence[Kind]) -> None:
        self._ways = ways
        self._kinds = tuple(kinds)
        self._slots = [ways.tables.job.num_slots(kind) for kind in kinds]
        self._parts: dict[frozenset[int], list[Part]] = {}

    def rate(self, guess_s: float) -> float:
        """Return how many micro-batches a second the first group does alone; 0: it cannot."""
        part = self._best(frozenset([0]), guess_s)
        return part.done_in(guess_s, False) / guess_s if part else 0.0

    def simple(self) -> list[Rough]:
        """Return the two pure families: a quick look."""
        every = frozenset(range(len(self._kinds)))
        guess = self._guess_s()
        alone = [part for g in sorted(every) if (part := self._best(frozenset([g]), guess))]
        found = [self._draft(alone)]
        found += [self._draft([part]) for part in self._part(every)]
        return sorted((d for d in found if d), key=lambda draft: draft.estimate_s)

    def drafts(self) -> list[Rough]:
        """Return the best draft for each number of parts, and those with left-overs pooled."""
        found: dict[tuple[int, str], Rough] = {}
        guess = self._guess_s()
        for _ in range(2):
            for draft in self._round(guess):
                key = (len(draft.sets), draft.origin)
                if key not in found or draft.estimate_s < found[key].estimate_s:
                    found[key] = draft
            guess = min((d.estimate_s for d in found.values()), default=guess)
        return sorted(found.values(), key=lambda draft: draft.estimate_s)

    def _round(self, guess_s: float) -> Iterator[Rough]:
        best = {m: part for m in self._subsets() if (part := self._best(m, guess_s))}
        for parts in _partitions(best, guess_s, len(self._kinds)):
            draft = self._draft(parts)
            if draft is not None:
                yield draft
        yield from self._pooled(guess_s)

    def _guess_s(self) -> float:
        """Return a step's time with a tenth more than compute."""
        pairs = zip(self._slots, self._kinds, strict=True)
        rate = sum(n / self._ways.tables.work_s(kind) for n, kind in pairs)
        return 1.1 * self._ways.micro_batches / rate

    def _subsets(self) -> list[frozenset[int]]:
        every = range(len(self._kinds))
        sizes = list(range(1, len(self._kinds) + 1))
        if len(self._kinds) > _WHOLE_LATTICE:
            sizes = [1, 2, len(self._kinds)]
        return [frozenset(chosen) for size in sizes for chosen in combinations(every, size)]

    def _best(self, members: frozenset[int], guess_s: float) -> Part | None:
        """Return the depth at which these groups do most, beside others if there are others."""
        others = len(members) < len(self._kinds)

        def done(part: Part) -> int:
            return part.done_in(guess_s, others or len(part.sets) > 1)

        return max(self._part(members), key=done, default=None)

    def _part(self, members: frozenset[int]) -> list[Part]:
        """Return the part at each depth that is worth a look."""
        if members not in self._parts:
            slots = [n if g in members else 0 for g, n in enumerate(self._slots)]
            self._parts[members] = [Part(members, sets) for sets in self._depths(slots)]
        return self._parts[members]

    def _depths(self, slots: Sequence[int]) -> Iterator[Sets]:
        total, seen, tried = sum(slots), set(), 0
        counted = Counter({kind: n for kind, n in zip(self._kinds, slots, strict=True) if n})
        for depth in range(self._ways.shallowest(counted), min(self._ways.max_stages, total) + 1):
            num = min(total // depth, self._ways.micro_batches)
            if num in seen or tried == _DEPTHS:
                continue
            seen.add(num)
            found = [sets for deal in self._deals(slots, num) if (sets := self._sets(deal))]
            yield from found
            tried += bool(found)

    def _deals(self, slots: Sequence[int], num: int) -> Iterator[Deal]:
        """Deal slots to `num` pipelines: all of them as evenly as they go, and only like shares."""
        work = [self._ways.tables.work_s(kind) for kind in self._kinds]
        rows = [[0] * len(slots) for _ in range(num)]
        speed = [0.0] * num
        for g in sorted(range(len(slots)), key=lambda g: (work[g], g)):
            each, rest = divmod(slots[g], num)
            for place, p in enumerate(sorted(range(num), key=lambda p: (speed[p], p))):
                rows[p][g] = each + (place < rest)
                speed[p] += rows[p][g] / work[g]
        dealt: Deal = Counter(self._counted(row) for row in rows)
        yield dealt
        alike = self._counted([n // num for n in slots])
        if len(dealt) > 1 and alike:
            yield Counter({alike: num})

    def _counted(self, row: Sequence[int]) -> tuple[tuple[Kind, int], ...]:
        return tuple((kind, n) for kind, n in zip(self._kinds, row, strict=True) if n)

    def _sets(self, deal: Deal) -> Sets:
        """Return pipelines for dealt slots; those that cannot hold the model are left out."""
        pairs = ((self._ways.rough(Counter(dict(slots))), n) for slots, n in sorted(deal.items()))
        return tuple((way, n) for way, n in pairs if way)

    def _pooled(self, guess_s: float) -> Iterator[Rough]:
        """Pipelines inside groups at their most efficient depth, and one family of left-overs."""
        sets: list[tuple[Way, int]] = []
        left = list(self._slots)
        for g in range(len(self._kinds)):
            best = self._efficient(g, guess_s)
            if best is not None:
                sets.append(best)
                left[g] -= best[1] * len(best[0].row)
        if sum(left) and sets:
            for extra in self._depths(left):
                draft = draft_of(self._ways, (*sets, *extra), "inside groups, left-overs across")
                if draft is not None:
                    yield draft

    def _efficient(self, g: int, guess_s: float) -> tuple[Way, int] | None:
        """Return the pipeline inside a group that does most per slot, and how many there can be."""
        kind = self._kinds[g]
        first = self._ways.shallowest(Counter({kind: self._slots[g]}))
        last = min(first + 2 * _DEPTHS, self._ways.max_stages, self._slots[g])
        best: tuple[float, tuple[Way, int] | None] = (0.0, None)
        for depth in range(first, last + 1):
            way = self._ways.rough(Counter({kind: depth}))
            if way is not None:
                rate = way.across.done_in(guess_s) / depth
                if rate > best[0]:
                    best = (rate, (way, self._slots[g] // depth))
        return best[1]

    def _draft(self, parts: Sequence[Part]) -> Rough | None:
        widest = max((len(part.members) for part in parts), default=0)
        origin = "inside groups" if widest == 1 else "across groups"
        if widest > 1 and len(parts) > 1:
            origin = "inside and across groups"
        return draft_of(self._ways, tuple(s for part in parts for s in part.sets), origin)


def _partitions(parts: dict[frozenset[int], Part], guess_s: float, num: int) -> list[list[Part]]:
    """Return for each number of parts the disjoint parts that do most within `guess_s`.

    A group may stay unused.
    """
    value = {
        members: part.done_in(guess_s, len(members) < num or len(part.sets) > 1)
        for members, part in parts.items()
    }
    # best[k][covered groups]: the most done by k disjoint parts, and which.
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
