"""Extra warm-up that hides the slow links of a plan's pipelines. Start at `with_warmup`.

Simulates a handful of warm-ups and keeps, for each pipeline, the shortest that fits into memory.
"""

from __future__ import annotations

import math
from dataclasses import replace

from mxn.train.plan.automatic import extra_for_links
from mxn.train.plan.cluster import Cluster
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.plan import TrainPlan
from mxn.train.plan.predict import Tuning
from mxn.train.plan.profile import Profiles
from mxn.train.plan.shape import ModelShape
from mxn.train.plan.simulate import Simulation, pipeline_times, simulate_plan

_MOST = 8  # more micro-batches ahead than this have their memory to pay and little to win
_WORTH = 0.995  # what a pipeline's time must fall to before it takes memory


def with_warmup(
    plan: TrainPlan,
    shape: ModelShape,
    cluster: Cluster,
    profiles: Profiles,
    *,
    memory: MemoryModel | None = None,
    tuning: Tuning | None = None,
) -> Simulation:
    """Return the simulation of `plan` with the best extra warm-up; `Simulation.plan` is that plan.

    The plan itself, simulated, where nothing is won: no slow link, no memory, or a schedule other
    than 1F1B and zero-bubble with one chunk. Raises: as `simulate_plan`.
    """
    bare = replace(
        plan, pipelines=tuple(replace(pipeline, extra_warmup=()) for pipeline in plan.pipelines)
    )

    def simulated(candidate: TrainPlan) -> Simulation:
        return simulate_plan(candidate, shape, cluster, profiles, memory=memory, tuning=tuning)

    base = simulated(bare)
    chunks = max(len(pipeline.stages[0].chunks) for pipeline in plan.pipelines)
    if plan.schedule not in ("1f1b", "zero-bubble") or chunks > 1:
        return base
    wanted = [
        extra_for_links(times) for times in pipeline_times(bare, shape, cluster, profiles, tuning)
    ]
    best = list(bare.pipelines)
    times = [base.timeline(number).makespan_s for number in range(len(best))]
    for top in range(1, min(max(max(extra) for extra in wanted), _MOST) + 1):
        tried = tuple(
            replace(pipeline, extra_warmup=tuple(min(count, top) for count in extra))
            for pipeline, extra in zip(bare.pipelines, wanted, strict=True)
        )
        seen = simulated(replace(bare, pipelines=tried))
        for number, seconds in enumerate(_seconds_that_fit(seen)):
            if seconds < times[number] * _WORTH:
                times[number], best[number] = seconds, tried[number]
    made = replace(bare, pipelines=tuple(best))
    return base if made == bare else simulated(made)


def _seconds_that_fit(simulation: Simulation) -> list[float]:
    """Return the time of each pipeline; infinite where a stage does not fit into its memory."""
    seconds = [
        simulation.timeline(number).makespan_s for number in range(len(simulation.plan.pipelines))
    ]
    for stage in simulation.prediction.stages:
        if not stage.fits:
            seconds[stage.pipeline] = math.inf
    return seconds
