"""Random uneven pipelines: how near closed forms come to the simulation, and what orders gain.

    python bench/train/orders.py [--seed 3] [--plans 150]

Two chips, one half as fast; cuts at random places; links free or slow (0.4 s where a layer's
forward takes 0.1 or 0.2 s). Everything is simulated; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from mxn.train.plan.automatic import best_order, extra_for_links
from mxn.train.plan.cluster import Link
from mxn.train.plan.events import simulate
from mxn.train.plan.plan import Schedule, TrainPlan
from mxn.train.plan.predict import predict
from mxn.train.plan.schedules import order
from mxn.train.plan.simulate import simulate_plan
from mxn.train.plan.times import Hop, PipelineTimes

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from support import tiny_plans

_LAYERS = 34


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--plans", type=int, default=150, help="for each schedule and link")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    result: dict[str, Any] = {"case": "train-orders", "basis": "simulated", "seed": options.seed}
    result["closed_form_against_simulation"] = closed_forms(rng, options.plans)
    result["orders_against_1f1b"] = orders(rng, 2 * options.plans)
    print(json.dumps(result))


def closed_forms(rng: random.Random, num_plans: int) -> dict[str, Any]:
    """Return mean and extreme relative difference of the closed form for each schedule."""
    found: dict[str, Any] = {}
    schedules: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved", "zero-bubble")
    for schedule in schedules:
        for words, link_s in (("free links", 0.0), ("slow links", 0.4)):
            errors = [_error(_plan(rng, schedule), link_s) for _ in range(num_plans)]
            mean = statistics.fmean(map(abs, errors))
            name = f"{schedule}, {words}"
            found[name] = {"mean": mean, "least": min(errors), "most": max(errors)}
            print(f"{name:24} mean {mean:6.1%}  {min(errors):+6.1%} to {max(errors):+6.1%}")
    return found


def _plan(rng: random.Random, schedule: Schedule) -> TrainPlan:
    num_stages, chunks = rng.randint(2, 8), 2 if schedule == "interleaved" else 1
    cuts = sorted(rng.sample(range(1, _LAYERS), num_stages * chunks - 1))
    groups = "".join(rng.choice("ab") for _ in range(num_stages))
    batches = num_stages * rng.choice((1, 2, 4, 8))
    pipeline = tiny_plans.pipeline([*cuts, _LAYERS], groups, batches)
    return tiny_plans.plan(pipeline, schedule=schedule, num_layers=_LAYERS)


def _error(plan: TrainPlan, link_s: float) -> float:
    link = Link(latency_s=link_s, bytes_per_s=1e15)
    cluster = tiny_plans.cluster(between=link, link=link)
    shape = tiny_plans.shape(_LAYERS - 2)
    closed = predict(plan, shape, cluster, tiny_plans.PROFILES)
    done = simulate_plan(plan, shape, cluster, tiny_plans.PROFILES)
    return closed.pipeline_s / done.prediction.pipeline_s - 1


def orders(rng: random.Random, num_pipelines: int) -> dict[str, Any]:
    """Return the time of other orders as a share of 1F1B's, mean and worst."""
    shares: dict[str, list[float]] = {}
    for _ in range(num_pipelines):
        times, batches = _times(rng), rng.randint(2, 20)
        num = times.num_stages
        base = simulate(order("1f1b", num, 1, batches), times).makespan_s
        extra = extra_for_links(times)
        limits = [num + 2] * num
        made = {
            "zero-bubble (H1)": simulate(order("zero-bubble", num, 1, batches), times),
            "1f1b, extra warm-up": simulate(
                order("1f1b", num, 1, batches, extra_warmup=extra), times
            ),
            "best, whole backwards, S + 2 stored": best_order(times, batches, limits),
            "best, split backwards, S + 2 stored": best_order(
                times, batches, limits, splits_weights=True
            ),
        }
        for name, line in made.items():
            shares.setdefault(name, []).append(line.makespan_s / base)
        shares.setdefault("no order is below", []).append(_bound_s(times, batches) / base)
    found: dict[str, Any] = {}
    for name, values in shares.items():
        found[name] = {"mean": statistics.fmean(values), "worst": max(values)}
        print(f"{name:36} {statistics.fmean(values):.3f} of 1f1b's time, worst {max(values):.3f}")
    return found


def _bound_s(times: PipelineTimes, batches: int) -> float:
    """Return what no order is faster than: a stage's way to its first pass, and all its work."""
    bound = head = 0.0
    for stage in range(times.num_stages):
        work = times.forward_s[stage][0] + times.backward_s[stage][0]
        bound = max(bound, head + batches * work)
        head += times.forward_s[stage][0]
        head += sum(times.forward_hops[stage]) if stage < len(times.forward_hops) else 0.0
    return bound


def _times(rng: random.Random) -> PipelineTimes:
    num = rng.randint(2, 6)

    def rows(low: int, high: int) -> tuple[tuple[float, ...], ...]:
        return tuple((rng.randint(low, high) / 4,) for _ in range(num))

    hops = tuple(Hop(rng.choice((0.0, 0.0, 0.5, 2.0))) for _ in range(num - 1))
    return PipelineTimes(
        forward_s=rows(4, 8),
        backward_s=rows(8, 16),
        weight_s=rows(3, 7),
        forward_hops=hops,
        backward_hops=hops,
    )


if __name__ == "__main__":
    main()
