"""How far sums of gradients run beside the last backward pass. Start at `Overlap.window`.

The runner sums buckets of whole layers, from the last layer down, each as soon as the last backward
pass has gone through its layers. A chip whose own work that does not slow (`ChipProfile.
overlaps_sums`) hides most of a sum so. Knows bytes and seconds of layers; knows nothing of links.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mxn.train.plan.cluster import Cluster
from mxn.train.plan.costs import CostBook
from mxn.train.plan.plan import Stage, TrainPlan
from mxn.train.plan.profile import Profiles
from mxn.train.plan.reduction import Member, Reduction
from mxn.train.plan.shape import ModelShape

BUCKET_BYTES = 8 << 20
"""Of gradients that are summed at once: large enough that a link runs at its rate, small enough
that summing starts early. A layer that has more is a bucket of its own."""

Window = Sequence[tuple[float, float]]
"""(seconds before the stage's end, share of the sum that begins then or later), of each bucket."""


class Overlap:
    """What the stages of one plan have left to do when parts of a sum may start."""

    def __init__(
        self,
        plan: TrainPlan,
        shape: ModelShape,
        cluster: Cluster,
        profiles: Profiles,
        book: CostBook,
    ) -> None:
        self._plan, self._shape, self._book = plan, shape, book
        chips = {group.name: group.chip for group in cluster.groups}
        # A zero-bubble step ends with the weight halves of a pass, so its sums start behind those.
        can = len(plan.pipelines) > 1 and plan.schedule != "zero-bubble"
        self._chips = {
            name: chip
            for name, chip in chips.items()
            if can and chip in profiles and profiles[chip].overlaps_sums
        }
        self._known: dict[object, Window] = {}

    def in_order(self, sums: Sequence[Reduction]) -> list[Reduction]:
        """Return sums as stages do them, the last layers' first.

        Where sums of layers start early, that of a tied matrix, which waits for all, comes last.
        """
        found = list(reversed(sums))
        if self._chips:
            found.sort(key=lambda one: one.layers is None)
        return found

    def window(self, one: Reduction, member: Member, early_s: float) -> Window:
        """Return when the parts of a sum may start on a member, before its stage's end.

        `early_s`: how long before it all of the sum may, where nothing is known of layers.
        """
        stage = self._plan.pipelines[member[0]].stages[member[1]]
        chip = self._chips.get(stage.group)
        if chip is None or one.layers is None:
            return ((early_s, 1.0),)
        key = (chip, stage.tp, stage.recompute, stage.chunks, one.layers, one.num_bytes)
        if key not in self._known:
            self._known[key] = self._window_of(one.layers, one.num_bytes, chip, stage)
        return self._known[key]

    def _window_of(
        self, layers: tuple[int, int], num_bytes: float, chip: str, stage: Stage
    ) -> Window:
        left = self._book.backward_left(chip, stage)
        sizes = {layer: float(self._shape.layers[layer].params) for layer in range(*layers)}
        waiting = self._take_tied(sizes)
        whole = sum(sizes.values()) + waiting
        if not whole:
            return ((0.0, 1.0),)
        rows = [(left[layer], size) for layer, size in sorted(sizes.items(), reverse=True)]
        buckets = _buckets(rows, BUCKET_BYTES * whole / num_bytes if num_bytes else whole)
        return _remaining([*buckets, (0.0, waiting)] if waiting else buckets)

    def _take_tied(self, sizes: dict[int, float]) -> float:
        """Take a tied matrix out of the layers' sizes; return it: it is summed when all is done."""
        last = self._shape.num_layers - 1
        if not self._shape.is_tied:
            return 0.0
        matrix, waiting = float(self._shape.layers[0].params), 0.0
        for layer in {0, last} & sizes.keys():
            waiting = min(matrix, sizes[layer])
            sizes[layer] -= waiting
        return waiting


def _buckets(rows: Iterable[tuple[float, float]], largest: float) -> list[tuple[float, float]]:
    """Put neighbours together; a bucket may start when the last of its layers may."""
    found: list[tuple[float, float]] = []
    for left_s, size in rows:
        if found and found[-1][1] + size <= largest:
            found[-1] = (left_s, found[-1][1] + size)
        else:
            found.append((left_s, size))
    return found


def _remaining(buckets: Sequence[tuple[float, float]]) -> Window:
    whole = sum(size for _, size in buckets)
    found: list[tuple[float, float]] = []
    done = 0.0
    for left_s, size in buckets:
        found.append((left_s, 1 - done / whole))
        done += size
    return tuple(found)


def span_of(
    seconds: float, members: Sequence[tuple[float, Window]], free_s: float
) -> tuple[float, float]:
    """Return when a sum of `seconds` starts and ends; `members` are (end of the stage, window).

    It starts when the first bucket of all members may and `free_s` is over, and each bucket waits
    for those before it and for its own layers.
    """
    start = max(free_s, *(end_s - window[0][0] for end_s, window in members))
    parts = (
        end_s - left_s + share * seconds for end_s, window in members for left_s, share in window
    )
    return start, max(free_s + seconds, *parts)
