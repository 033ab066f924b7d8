"""Why this plan, in plain words and as data: what is lost where, and what would help.

The pool's compute (U' of `bounds`) is shared out over what it is spent on: the model's work, and
each kind of loss. Counterfactuals ask the predictor again, for the same plan with another link or
batch; a new search could gain more. Start at `explain`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from mxn.train.plan.bounds import Bounds
from mxn.train.plan.cluster import Cluster
from mxn.train.plan.losses import WORDS, Asked, shares_of, with_links
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.plan import Pipeline, TrainPlan
from mxn.train.plan.profile import Profiles
from mxn.train.plan.search.choices import Candidate, Found
from mxn.train.plan.shape import ModelShape
from mxn.units import format_bytes, format_rate, format_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """A plan that was not chosen, and how much longer its step is."""

    origin: str
    slower: float  # share of the best plan's step
    summary: str
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """The tightest device of a group."""

    group: str
    memory_bytes: float
    limit_bytes: int
    stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """`shares` add up to 1; `helps` are (what, how much more tokens per second)."""

    summary: str
    reasons: tuple[str, ...]
    tokens_per_s: float
    ratio: float | None  # R
    strict_ratio: float  # R'
    shares: Mapping[str, float]
    margins: tuple[Margin, ...]
    rivals: tuple[Rival, ...]
    rejected: tuple[str, ...]
    helps: tuple[tuple[str, float], ...]
    num_looked_at: int
    is_exact: bool
    how: str  # the search was done
    basis: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as data for JSON."""
        return asdict(self) | {"shares": dict(self.shares)}

    def lines(self) -> Iterator[str]:
        """Return it as text."""
        yield self.summary
        yield from (f"  {reason}" for reason in self.reasons)
        yield ""
        yield self._bound_line()
        yield "where the pool's compute goes:"
        for name, share in self.shares.items():
            if abs(share) >= 0.0005:
                yield f"  {share:6.1%}  {WORDS[name]}"
        yield "memory:"
        for m in self.margins:
            yield (
                f"  {m.group}: {format_bytes(m.memory_bytes)} of {format_bytes(m.limit_bytes)} at "
                f"the fullest, stage {m.stage}: {1 - m.memory_bytes / m.limit_bytes:.0%} free"
            )
        if self.rivals:
            yield "instead:"
        for rival in self.rivals:
            yield f"  {rival.summary}: {rival.slower:+.1%} time"
            yield from (f"    {difference}" for difference in rival.differences)
        if self.rejected:
            yield "refused:"
            yield from (f"  {reason}" for reason in self.rejected)
        if self.helps:
            yield "what would help this plan:"
            yield from (f"  {what}: {gain:+.1%} tokens/s" for what, gain in self.helps)
        yield f"looked at: {self.num_looked_at} plans; {self.how}"

    def _bound_line(self) -> str:
        strict = f"R' = {self.strict_ratio:.1%} of compute alone"
        if self.ratio is None:
            return f"{strict}; R is unknown: the model does not fit on one of the chips alone"
        return f"R = {self.ratio:.1%} of the groups' own best plans added up; {strict}"


def explain(
    found: Found,
    shape: ModelShape,
    cluster: Cluster,
    profiles: Profiles,
    bounds: Bounds,
    *,
    memory: MemoryModel | None = None,
) -> Explanation:
    """Return why `found.best` was chosen. `bounds` are those of the same model, rows and pool."""
    best = found.best
    asked = Asked(shape, cluster, profiles, memory or MemoryModel())
    ratio, strict = bounds.ratios(best.prediction.tokens_per_s)
    return Explanation(
        summary=_summary(best),
        reasons=tuple(_reasons(best.plan, cluster)),
        tokens_per_s=best.prediction.tokens_per_s,
        ratio=ratio,
        strict_ratio=strict,
        shares=shares_of(best, asked, bounds),
        margins=tuple(_margins(best)),
        rivals=tuple(_rivals(found)),
        rejected=tuple(dict.fromkeys(r.reason for r in found.rejected)),
        helps=tuple(_helps(best.plan, asked)),
        num_looked_at=found.num_looked_at,
        is_exact=found.is_exact,
        how=found.how,
        basis=best.prediction.basis,
    )


def _summary(candidate: Candidate) -> str:
    seen = candidate.prediction
    how = "simulated" if candidate.is_simulated else "predicted"
    return (
        f"{describe(candidate.plan)}: {format_seconds(seen.iteration_s)} a step, "
        f"{format_rate(seen.tokens_per_s, 'tokens/s')} ({how} from {seen.basis} figures)"
    )


def describe(plan: TrainPlan) -> str:
    """Return a plan in one line."""
    alike = Counter(_outline(pipeline) for pipeline in plan.pipelines)
    kinds = " + ".join(f"{num} x [{outline}]" for outline, num in list(alike.items())[:4])
    more = f" + {len(alike) - 4} other kinds" if len(alike) > 4 else ""
    sharded = ", optimizer state shared out" if plan.shards_optimizer else ""
    return f"{kinds}{more}, {plan.schedule}, {plan.micro_batch} rows a micro-batch{sharded}"


def _outline(pipeline: Pipeline) -> str:
    """Return runs of stages with the same group and width, with their layers."""
    runs: list[tuple[tuple[str, int], list[int]]] = []
    for stage in pipeline.stages:
        key = (stage.group, stage.tp)
        if not runs or runs[-1][0] != key:
            runs.append((key, []))
        runs[-1][1].append(stage.num_layers)
    return " → ".join(
        f"{group}{f' tp{tp}' if tp > 1 else ''}: {_counted(layers)}" for (group, tp), layers in runs
    )


def _counted(layers: list[int]) -> str:
    """Return "3+4x7+8" for 3, 7, 7, 7, 7, 8."""
    runs = ((size, len(list(like))) for size, like in groupby(layers))
    return "+".join(f"{num}x{size}" if num > 1 else str(size) for size, num in runs)


def _reasons(plan: TrainPlan, cluster: Cluster) -> Iterator[str]:
    groups = {stage.group for pipeline in plan.pipelines for stage in pipeline.stages}
    mixed = [p for p in plan.pipelines if len({stage.group for stage in p.stages}) > 1]
    if len(groups) > 1 and len(mixed) == len(plan.pipelines):
        yield "each pipeline runs over several chips, so that sums of gradients can stay in a group"
    elif len(groups) > 1 and not mixed:
        yield "each pipeline stays in one group: only gradients cross between chips"
    elif mixed:
        yield f"{len(mixed)} of {len(plan.pipelines)} pipelines run over several chips"
    shares = sorted({pipeline.micro_batches for pipeline in plan.pipelines})
    if len(shares) > 1:
        yield f"faster pipelines do more micro-batches: {shares[0]} to {shares[-1]} a step"
    again = Counter(s.recompute for p in plan.pipelines for s in p.stages if s.recompute != "none")
    for how, num in again.items():
        yield f"{num} stages compute activations again ({how}), for memory"
    unused = [group.name for group in cluster.groups if group.name not in groups]
    if unused:
        yield f"{', '.join(unused)} would slow the others down and is left out"


def _margins(best: Candidate) -> Iterator[Margin]:
    tightest: dict[str, Margin] = {}
    for stage in best.prediction.stages:
        group = best.plan.pipelines[stage.pipeline].stages[stage.stage].group
        if group not in tightest or stage.memory_bytes > tightest[group].memory_bytes:
            tightest[group] = Margin(
                group=group, memory_bytes=stage.memory_bytes,
                limit_bytes=stage.memory_limit_bytes, stage=stage.stage,
            )  # fmt: skip
    yield from tightest.values()


def _rivals(found: Found) -> Iterator[Rival]:
    base = found.best.prediction
    for rival in found.runners_up:
        seen = rival.prediction
        differences = tuple(
            f"{name} {format_seconds(theirs)} instead of {format_seconds(ours)}"
            for name, theirs, ours in (
                ("pipelines", seen.pipeline_s, base.pipeline_s),
                ("sums of gradients", seen.reduce_s, base.reduce_s),
                ("optimizer", seen.optimizer_s, base.optimizer_s),
            )
            if abs(theirs - ours) > 0.005 * base.iteration_s
        )
        yield Rival(
            origin=rival.origin, slower=seen.iteration_s / base.iteration_s - 1,
            summary=describe(rival.plan), differences=differences,
        )  # fmt: skip


def _helps(plan: TrainPlan, asked: Asked) -> Iterator[tuple[str, float]]:
    """Return what changing one thing would gain, the plan kept."""
    base = asked.predict(plan).tokens_per_s
    more = replace(
        plan,
        pipelines=tuple(
            replace(pipeline, micro_batches=2 * pipeline.micro_batches)
            for pipeline in plan.pipelines
        ),
    )
    changes = [("twice the rows a step", asked.predict(more).tokens_per_s)]
    if len(asked.cluster.groups) > 1:
        faster = with_links(asked.cluster, "between")
        changes.append(
            ("links between groups 10 times as fast", asked.predict(plan, faster).tokens_per_s)
        )
    inner = with_links(asked.cluster, "inside")
    changes.append(
        ("links inside groups 10 times as fast", asked.predict(plan, inner).tokens_per_s)
    )
    for what, rate in sorted(changes, key=lambda change: -change[1]):
        if rate > base * 1.001:
            yield what, rate / base - 1
