"""Predicts drafts, refuses what does not fit, tries schedules, simulates the best: `Judge`.

Deterministic: of two that tie, the one with fewer devices or the one found first wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from mxn.train.plan.plan import Pipeline, TrainPlan
from mxn.train.plan.predict import predict
from mxn.train.plan.prediction import Prediction
from mxn.train.plan.search.build import plan_of, settled
from mxn.train.plan.search.choices import Candidate, Found, Limits, Rejected
from mxn.train.plan.search.draft import Draft
from mxn.train.plan.search.polish import neighbours
from mxn.train.plan.search.tables import TableBook
from mxn.train.plan.simulate import simulate_plan
from mxn.train.plan.warmup import with_warmup
from mxn.units import format_bytes

_HOPELESS = 1.15  # an estimate that is so much over the best plan is not predicted

_NUM_POLISHED = 4  # kinds of plans whose best is improved by small steps
_SMALL = 8  # devices: up to so many, more is tried
_FEWEST_LOOKS = 48
_MOST_LOOKS = 400  # of one such climb in a small pool, fewer in a large one
_MOST_SIMULATED = 24  # whatever the closed form promises
_DOUBT = 0.9  # of a small pool's closed forms: in short steps they are up to a tenth too long
_NUM_WARMED = 3  # of the best, that get extra warm-up if it helps them
_MOST_WARMED = 64  # devices of a pool; beyond, it takes seconds
_NUM_RESCHEDULED = 8  # of the best, that are tried under every schedule and placement


class Judge:
    """Collects candidates of one search."""

    def __init__(self, book: TableBook, rows: int, limits: Limits) -> None:
        self._book = book
        self._job = book.job
        self._rows = rows
        self._limits = limits
        self._is_small = self._job.cluster.num_devices <= _SMALL
        self._best_s = float("inf")
        self._fit: dict[TrainPlan, Candidate] = {}
        self._drafts: dict[TrainPlan, Draft] = {}
        self._seen: set[TrainPlan] = set()
        self._by_stage: set[TrainPlan] = set()
        self._refused: dict[TrainPlan, Rejected] = {}

    def look(self, drafts: Iterable[Draft]) -> None:
        """Predict each draft that could be among the best."""
        for draft in drafts:
            if draft.estimate_s <= self.worth_s():
                self._look_at(draft)

    def best_s(self) -> float:
        """Return the least iteration so far; infinite when nothing fits."""
        return self._best_s

    def worth_s(self) -> float:
        """Return the largest estimate that is still predicted."""
        return self._best_s * _HOPELESS

    def finish(self, *, is_exact: bool) -> Found | None:
        """Return the ranking; None when no plan fits."""
        for candidate in self._ranked()[:_NUM_RESCHEDULED]:
            draft = self._drafts[candidate.plan]
            for style in self._limits.styles:
                self._look_at(replace(draft, style=style))
        for candidate in self._ranked()[:_NUM_RESCHEDULED]:
            self._place_otherwise(candidate)
        for candidate in self._tops():
            self._climb(candidate)
        allowed = [c for c in self._ranked() if c.plan.schedule in self._limits.schedules]
        ranking = self._warmed(self._simulated(allowed)) if allowed else []
        if not ranking:
            return None
        return Found(
            best=ranking[0],
            runners_up=tuple(ranking[1 : 1 + self._limits.num_kept]),
            rejected=tuple(self._refused.values())[: self._limits.num_kept],
            num_looked_at=len(self._seen),
            is_exact=is_exact,
        )

    def accept(self, plan: TrainPlan) -> Found | None:
        """Return a plan that no draft led to as all that was found; None when it does not fit."""
        seen = self._predict(plan)
        if not seen.fits:
            return None
        return Found(
            best=Candidate(plan=plan, prediction=seen, origin="least memory"), runners_up=(),
            rejected=tuple(self._refused.values())[: self._limits.num_kept],
            num_looked_at=len(self._seen) + 1, is_exact=False,
        )  # fmt: skip

    def _simulated(self, allowed: Sequence[Candidate]) -> list[Candidate]:
        """Return the best few as simulated, in their order, then the others as predicted.

        One more is simulated while the closed form promises that it may beat the simulated best.
        """
        found: list[Candidate] = []
        if not self._limits.num_simulated:
            return list(allowed)
        doubt = _DOUBT if self._is_small else 1.0
        for number, candidate in enumerate(allowed):
            fits = [c.prediction.iteration_s for c in found if c.prediction.fits]
            enough = number >= self._limits.num_simulated and fits
            hopeless = fits and candidate.prediction.iteration_s * doubt >= min(fits)
            if enough and (hopeless or number >= _MOST_SIMULATED):
                break
            found.append(self._simulate(candidate))
        fits = [c for c in found if c.prediction.fits]
        fits.sort(key=lambda c: (round(c.prediction.iteration_s, 12), c.plan.num_devices))
        return fits + list(allowed[len(found) :])

    def _warmed(self, ranking: list[Candidate]) -> list[Candidate]:
        """Return the ranking with extra warm-up on the best few, where it hides their links."""
        if not self._limits.num_simulated or self._job.cluster.num_devices > _MOST_WARMED:
            return ranking
        job, found = self._job, list(ranking)
        for number, candidate in enumerate(ranking[:_NUM_WARMED]):
            if not candidate.is_simulated or max(map(_depth, candidate.plan.pipelines)) < 2:
                continue
            seen = with_warmup(
                candidate.plan, job.shape, job.cluster, job.profiles, memory=job.memory
            )
            if seen.prediction.fits and seen.plan != candidate.plan:
                found[number] = replace(candidate, plan=seen.plan, prediction=seen.prediction)
        return sorted(
            found, key=lambda c: (not c.is_simulated, round(c.prediction.iteration_s, 12))
        )

    def _simulate(self, candidate: Candidate) -> Candidate:
        job = self._job
        seen = simulate_plan(
            candidate.plan, job.shape, job.cluster, job.profiles, memory=job.memory
        ).prediction
        if not seen.fits:
            reason = _too_large(candidate.plan, seen)
            self._refused[candidate.plan] = Rejected(
                plan=candidate.plan, origin=candidate.origin, reason=reason
            )
        return replace(candidate, prediction=seen, is_simulated=True)

    def _tops(self) -> list[Candidate]:
        """Return the best plan of each of the best few kinds: depths, schedule, micro-batch.

        In a large pool pipelines are counted instead of their depths compared.
        """
        found: dict[object, Candidate] = {}
        for candidate in self._ranked():
            plan = candidate.plan
            chunks = len(plan.pipelines[0].stages[0].chunks)
            depths = tuple(sorted(len(pipeline.stages) for pipeline in plan.pipelines))
            kind = depths if self._is_small else len(depths)
            found.setdefault((kind, plan.schedule, chunks, plan.micro_batch), candidate)
        return list(found.values())[: 3 * _NUM_POLISHED if self._is_small else _NUM_POLISHED]

    def _climb(self, candidate: Candidate) -> None:
        """Change a plan by small steps that make it quicker, within a number of looks."""
        left = max(_MOST_LOOKS // max(candidate.plan.num_devices // 8, 1), _FEWEST_LOOKS)
        draft = settled(self._drafts[candidate.plan], self._rows)
        by_stage = candidate.plan in self._by_stage
        best_s, climbs = candidate.prediction.iteration_s, True
        while climbs:
            climbs = False
            for other in neighbours(draft):
                left -= 1
                found = self._look_at(other, by_stage=by_stage)
                if found and found.prediction.iteration_s < best_s * (1 - 1e-9):
                    best_s, draft, climbs = found.prediction.iteration_s, other, left > 0
                    break
                if left <= 0:
                    return

    def _place_otherwise(self, candidate: Candidate) -> None:
        """Look at the other placement of a plan; the slower of the two is of no more interest."""
        draft = self._drafts[candidate.plan]
        self._look_at(draft, by_stage=True)
        other = plan_of(self._book, draft, self._rows, by_stage=True)
        if other in self._fit and other != candidate.plan:
            pair = (candidate, self._fit[other])
            slower = max(pair, key=lambda c: c.prediction.iteration_s)
            del self._fit[slower.plan]

    def _look_at(self, draft: Draft, *, by_stage: bool = False) -> Candidate | None:
        if draft.is_flat and draft.style != self._limits.styles[0]:
            return None  # pipelines of one stage do the same under every schedule
        plan = plan_of(self._book, draft, self._rows, by_stage=by_stage)
        if plan is None:
            return None
        if plan in self._seen:
            return self._fit.get(plan)
        self._seen.add(plan)
        found = self._predict(plan)
        if found.fits:
            self._fit[plan] = Candidate(plan=plan, prediction=found, origin=draft.origin)
            self._drafts[plan] = draft
            if by_stage:
                self._by_stage.add(plan)
            self._best_s = min(self._best_s, found.iteration_s)
            return self._fit[plan]
        reason = _too_large(plan, found)
        self._refused[plan] = Rejected(plan=plan, origin=draft.origin, reason=reason)
        return None

    def _ranked(self) -> list[Candidate]:
        return sorted(
            self._fit.values(),
            key=lambda c: (round(c.prediction.iteration_s, 12), c.plan.num_devices),
        )

    def _predict(self, plan: TrainPlan) -> Prediction:
        job = self._job
        return predict(plan, job.shape, job.cluster, job.profiles, memory=job.memory)


def _depth(pipeline: Pipeline) -> int:
    return len(pipeline.stages)


def _too_large(plan: TrainPlan, found: Prediction) -> str:
    worst = max(found.stages, key=lambda s: s.memory_bytes / s.memory_limit_bytes)
    stage = plan.pipelines[worst.pipeline].stages[worst.stage]
    return (
        f"stage {worst.stage} of pipeline {worst.pipeline} ({stage.group}, {stage.num_layers} "
        f"layers, {plan.schedule}) needs {format_bytes(worst.memory_bytes)} on each device, "
        f"which may use {format_bytes(worst.memory_limit_bytes)}"
    )
