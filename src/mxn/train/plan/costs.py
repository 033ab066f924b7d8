"""What a stage costs: its layers' profiled times added up. Start at `CostBook.stage`.

Sums are kept as prefixes for each chip and tensor-parallel width, so a stage costs two look-ups per
chunk however many layers it has. Knows no schedule and no link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from mxn.errors import UserError
from mxn.train.plan.experts import held_params
from mxn.train.plan.memory import anew_bytes, kept_bytes
from mxn.train.plan.plan import Recompute, Stage
from mxn.train.plan.profile import Profiles
from mxn.train.plan.shape import LayerShape, ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """One stage and one micro-batch: seconds of its devices, and bytes on each of them.

    `backward_s` holds all of the backward, recomputation too; `weight_s` is the part of it that can
    wait. `params` are per device. Of `owned_params` one device keeps and updates the optimizer
    state, where pipelines share that out: the one that has most of it.
    """

    forward_s: float
    backward_s: float
    weight_s: float
    optimizer_s: float  # once per step, of `owned_params`
    params: float
    kept_bytes: float
    working_bytes: float
    owned_params: float = 0.0
    in_bytes: float = 0.0  # that come from other stages, one way, over all chunks
    out_bytes: float = 0.0
    message_bytes: float = 0.0  # of the largest of them
    summed_params: float = 0.0  # whose gradients are summed as whole tensors, beside the device's

    @property
    def busy_s(self) -> float:
        return self.forward_s + self.backward_s


def core_share(layer: LayerShape) -> float:
    """Return which part of a layer's forward work is attention over the context, 0 to 1.

    It is what remains after two operations per weight; selective recomputation does it twice.
    """
    if layer.forward_flop <= 0 or not layer.is_block:
        return 0.0
    weights = layer.params if layer.active_params is None else layer.active_params
    return min(max(1 - 2 * weights / layer.forward_flop, 0.0), 1.0)


class CostBook:
    """Costs of any run of layers on any chip of `profiles`, for one shape and micro-batch."""

    def __init__(
        self,
        shape: ModelShape,
        profiles: Profiles,
        micro_batch: int,
        *,
        expert_parallel: int = 1,
        shards: int = 1,
        shares_layers: bool = False,
        uneven_layers: frozenset[int] = frozenset(),
    ) -> None:
        """`shards` pipelines share the optimizer out, by whole layers or evenly.

        `uneven_layers` as in `TrainPlan`.
        """
        self._uneven = uneven_layers
        # A stage knows no neighbours: what comes in is taken as that of the widest chip.
        self.widest = max((profile.width for profile in profiles.values()), default=1.0)
        self._shards, self._shares_layers = shards, shares_layers
        self._shape = shape
        self._profiles = profiles
        self._micro_batch = micro_batch
        self._expert_parallel = expert_parallel
        self._sums: dict[tuple[str, int, Recompute], tuple[list[float], ...]] = {}
        self._anew: dict[tuple[str, int, Recompute], list[float]] = {}

    def stage(self, chip: str, stage: Stage) -> StageCost:
        """Return the cost of `stage` on `chip`.

        Raises: UserError when the chip, or a kind of layer on it, has no profile.
        """
        sums = self._prefixes(chip, stage.tp, stage.recompute)
        total = [
            sum(column[chunk.end] - column[chunk.first] for chunk in stage.chunks)
            for column in sums
        ]
        forward_s, backward_s, weight_s, _, params, kept = total
        if self._shape.is_tied and stage.num_layers == self._shape.num_layers:
            params -= sums[4][1]  # embedding and head are one matrix here: held once
        optimizer_s, owned = (self._owned(column, stage) for column in sums[3:5])
        width = self._profiles[chip].width
        ins = [self._output(chunk.first - 1, self.widest) for chunk in stage.chunks]
        outs = [self._output(chunk.end - 1, width) for chunk in stage.chunks]
        return StageCost(
            forward_s=forward_s,
            backward_s=backward_s,
            weight_s=weight_s,
            optimizer_s=optimizer_s,
            params=params,
            kept_bytes=kept,
            working_bytes=self._working(chip, stage) if stage.recompute != "none" else 0.0,
            owned_params=owned,
            in_bytes=sum(ins),
            out_bytes=sum(outs),
            message_bytes=max(*ins, *outs),
            summed_params=self._summed(stage),
        )

    def backward_left(self, chip: str, stage: Stage) -> dict[int, float]:
        """Return what is left of a backward pass behind each layer: seconds, by layer.

        Chunks are taken to be passed one right after another, the last one first.
        """
        column = self._prefixes(chip, stage.tp, stage.recompute)[1]
        found: dict[int, float] = {}
        left_s = 0.0
        for chunk in stage.chunks:
            for layer in range(chunk.first, chunk.end):
                found[layer] = left_s + column[layer] - column[chunk.first]
            left_s += column[chunk.end] - column[chunk.first]
        return found

    def _summed(self, stage: Stage) -> float:
        """Return the parameters of the stage's uneven layers; a tied matrix is summed apart."""
        ends = {0, self._shape.num_layers - 1} if self._shape.is_tied else set()
        return sum(
            held_params(self._shape.layers[layer], self._expert_parallel)
            for layer in self._uneven - ends
            if any(chunk.first <= layer < chunk.end for chunk in stage.chunks)
        )

    def _output(self, layer: int, width: float) -> float:
        """Return the bytes of what a layer hands on; whole on each device."""
        if layer < 0:
            return 0.0
        tokens = self._micro_batch * self._shape.seq_tokens
        return self._shape.layers[layer].output_bytes * tokens * width

    def _owned(self, column: Sequence[float], stage: Stage) -> float:
        """Return the largest part of a stage's column that one of the shards has."""
        return largest_share(
            column, [(chunk.first, chunk.end) for chunk in stage.chunks],
            self._shards if self._shares_layers else 1, is_tied=self._shape.is_tied,
        ) / (1 if self._shares_layers else self._shards)  # fmt: skip

    def _working(self, chip: str, stage: Stage) -> float:
        key = (chip, stage.tp, stage.recompute)
        if key not in self._anew:
            profile, tokens = self._profiles[chip], self._micro_batch * self._shape.seq_tokens
            self._anew[key] = [
                anew_bytes(
                    layer,
                    tokens,
                    stage.tp,
                    stage.recompute,
                    profile.layer(layer.kind, self._micro_batch, stage.tp).activation_bytes,
                    width=profile.width,
                )
                for layer in self._shape.layers
            ]
        return max(max(self._anew[key][chunk.first : chunk.end]) for chunk in stage.chunks)

    def _prefixes(self, chip: str, tp: int, recompute: Recompute) -> tuple[list[float], ...]:
        key = (chip, tp, recompute)
        if key not in self._sums:
            layers = self._shape.layers
            alike = {id(layer): layer for layer in layers}
            row = {at: self._row(chip, tp, recompute, layer) for at, layer in alike.items()}
            rows = [row[id(layer)] for layer in layers]
            self._sums[key] = tuple(
                list(accumulate(column, initial=0.0)) for column in zip(*rows, strict=True)
            )
        return self._sums[key]

    def _row(
        self, chip: str, tp: int, recompute: Recompute, layer: LayerShape
    ) -> tuple[float, float, float, float, float, float]:
        profile = self._profiles.get(chip)
        if profile is None:
            known = ", ".join(sorted(self._profiles))
            raise UserError(f"chip {chip!r} has no profile", hint=f"there are: {known}")
        cost = profile.layer(layer.kind, self._micro_batch, tp)
        shares = {"none": 0.0, "selective": core_share(layer), "full": 1.0}
        again = shares[recompute] if layer.is_block else 0.0
        weight_s = cost.backward_s / 2 if cost.weight_s is None else cost.weight_s
        tokens = self._micro_batch * self._shape.seq_tokens
        held = held_params(layer, self._expert_parallel)
        return (
            cost.forward_s,
            cost.backward_s + again * cost.forward_s,
            weight_s,
            cost.optimizer_s * (held / layer.params if layer.params else 1.0),
            layer.params_on(tp, held),
            kept_bytes(layer, tokens, tp, recompute, cost.activation_bytes, width=profile.width),
        )


def largest_share(
    column: Sequence[float], runs: Sequence[tuple[int, int]], shards: int, *, is_tied: bool
) -> float:
    """Return the most that one of `shards` owns of runs of layers; `column` holds prefix sums.

    Layer i is owned by shard i mod `shards`, as in `run.sharded.owner_of`. A tied matrix is not
    divided, and counts once where one stage holds it twice.
    """
    last = len(column) - 2
    if shards == 1:
        whole = sum(column[end] - column[first] for first, end in runs)
        has_all = is_tied and sum(end - first for first, end in runs) == last + 1
        return whole - (column[1] if has_all else 0.0)
    parts, undivided = [0.0] * shards, 0.0
    for first, end in runs:
        for layer in range(first, end):
            value = column[layer + 1] - column[layer]
            if is_tied and layer in (0, last):
                undivided += value
            else:
                parts[layer % shards] += value
    if is_tied and sum(end - first for first, end in runs) == last + 1:
        undivided -= column[1]
    return undivided + max(parts)
