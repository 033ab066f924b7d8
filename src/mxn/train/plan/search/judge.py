"""Predicts drafts, refuses what does not fit, tries schedules, simulates the best: `Judge`.

Deterministic: of two that tie, the one with fewer devices or the one found first wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from mxn.errors import CapacityError
from mxn.train.plan.plan import TrainPlan
from mxn.train.plan.predict import predict
from mxn.train.plan.prediction import Prediction
from mxn.train.plan.search.build import plans_of, with_schedule
from mxn.train.plan.search.choices import Candidate, Found, Limits, Rejected
from mxn.train.plan.search.draft import Draft
from mxn.train.plan.search.tables import TableBook
from mxn.train.plan.simulate import simulate_plan
from mxn.units import format_bytes

_HOPELESS = 1.3  # an estimate that is so much over the best plan is not predicted

_MOST_SIMULATED = 24  # whatever the closed form promises
_NUM_RESCHEDULED = 10  # of the best as 1F1B and by estimate, tried under every schedule


class Judge:
    """Collects candidates of one search."""

    def __init__(self, book: TableBook, rows: int, limits: Limits) -> None:
        self._book = book
        self._job = book.job
        self._rows = rows
        self._limits = limits
        self._best_s = float("inf")
        self._fit: dict[TrainPlan, Candidate] = {}
        self._estimates: dict[TrainPlan, float] = {}
        self._seen: set[TrainPlan] = set()
        self._refused: dict[TrainPlan, Rejected] = {}

    def look(self, drafts: Iterable[Draft]) -> None:
        """Predict each draft as 1F1B, in each placement."""
        for draft in drafts:
            if draft.estimate_s > self.worth_s():
                continue
            looks = [
                found
                for plan in plans_of(self._book, draft, self._rows)
                if (found := self._look_at(plan, draft.origin))
            ]
            # Of two placements of one draft, the slower is of no more interest.
            looks.sort(key=lambda c: c.prediction.iteration_s)
            for slower in looks[1:]:
                self._fit.pop(slower.plan, None)
            for best in looks[:1]:
                self._estimates[best.plan] = draft.estimate_s

    def best_s(self) -> float:
        """Return the least iteration so far; infinite when nothing fits."""
        return self._best_s

    def worth_s(self) -> float:
        """Return the largest estimate that is still predicted."""
        return self._best_s * _HOPELESS

    def finish(self, *, is_exact: bool) -> Found:
        """Return the ranking. Raises: CapacityError when no plan fits, with the nearest one."""
        by_estimate = sorted(self._estimates, key=lambda plan: self._estimates[plan])
        quick = [self._fit[plan] for plan in by_estimate[:_NUM_RESCHEDULED]]
        for candidate in {c.plan: c for c in self._ranked()[:_NUM_RESCHEDULED] + quick}.values():
            self._other_schedules(candidate)
        allowed = [c for c in self._ranked() if c.plan.schedule in self._limits.schedules]
        if not allowed:
            raise self._nothing_fits()
        ranking = self._simulated(allowed)
        return Found(
            best=ranking[0],
            runners_up=tuple(ranking[1 : 1 + self._limits.num_kept]),
            rejected=tuple(self._refused.values())[: self._limits.num_kept],
            num_looked_at=len(self._seen),
            is_exact=is_exact,
        )

    def _simulated(self, allowed: Sequence[Candidate]) -> list[Candidate]:
        """Return the best few as simulated, in their order, then the others as predicted.

        One more is simulated while the closed form promises that it beats the simulated best.
        """
        found: list[Candidate] = []
        if not self._limits.num_simulated:
            return list(allowed)
        for number, candidate in enumerate(allowed):
            best = min((c.prediction.iteration_s for c in found), default=float("inf"))
            enough = number >= self._limits.num_simulated
            if enough and (candidate.prediction.iteration_s >= best or number >= _MOST_SIMULATED):
                break
            found.append(self._simulate(candidate))
        fits = [c for c in found if c.prediction.fits]
        fits.sort(key=lambda c: (round(c.prediction.iteration_s, 12), c.plan.num_devices))
        rest = list(allowed[len(found) :])
        if not fits and not rest:
            raise self._nothing_fits()
        return fits + rest

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

    def _look_at(self, plan: TrainPlan, origin: str) -> Candidate | None:
        if plan in self._seen:
            return self._fit.get(plan)
        self._seen.add(plan)
        job = self._job
        found = predict(plan, job.shape, job.cluster, job.profiles, memory=job.memory)
        if found.fits:
            self._fit[plan] = Candidate(plan=plan, prediction=found, origin=origin)
            self._best_s = min(self._best_s, found.iteration_s)
            return self._fit[plan]
        reason = _too_large(plan, found)
        self._refused[plan] = Rejected(plan=plan, origin=origin, reason=reason)
        return None

    def _other_schedules(self, candidate: Candidate) -> None:
        plan = candidate.plan
        if max(len(p.stages) for p in plan.pipelines) == 1:
            return
        for schedule in self._limits.schedules:
            counts = range(2, self._limits.max_chunks + 1) if schedule == "interleaved" else (1,)
            for num_chunks in counts:
                other = with_schedule(plan, schedule, num_chunks)
                if other is not None:
                    self._look_at(other, candidate.origin)

    def _ranked(self) -> list[Candidate]:
        return sorted(
            self._fit.values(),
            key=lambda c: (round(c.prediction.iteration_s, 12), c.plan.num_devices),
        )

    def _nothing_fits(self) -> CapacityError:
        reason = "no cut of the model fits into any set of devices"
        if self._refused:
            reason = min((self._excess(r.plan), r.reason) for r in self._refused.values())[1]
        return CapacityError(
            f"the model does not fit into this pool: {reason}",
            hint="more devices, larger tensor parallelism, a smaller micro-batch or shorter rows",
        )

    def _excess(self, plan: TrainPlan) -> float:
        stages = self._predict(plan).stages
        return max(stage.memory_bytes / stage.memory_limit_bytes for stage in stages)

    def _predict(self, plan: TrainPlan) -> Prediction:
        job = self._job
        return predict(plan, job.shape, job.cluster, job.profiles, memory=job.memory)


def _too_large(plan: TrainPlan, found: Prediction) -> str:
    worst = max(found.stages, key=lambda s: s.memory_bytes / s.memory_limit_bytes)
    stage = plan.pipelines[worst.pipeline].stages[worst.stage]
    return (
        f"stage {worst.stage} of pipeline {worst.pipeline} ({stage.group}, {stage.num_layers} "
        f"layers, {plan.schedule}) needs {format_bytes(worst.memory_bytes)} on each device, "
        f"which may use {format_bytes(worst.memory_limit_bytes)}"
    )
