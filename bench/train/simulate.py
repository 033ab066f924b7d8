"""How long the event simulator takes: large pipelines, ten thousand devices, their pictures.

    python bench/train/simulate.py [--repeats 10] [--out bench/results/train-simulate.json]

Before it times anything it checks the simulated steps against closed forms. Times are CPU seconds
of one core. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mxn.train.plan.automatic import best_order
from mxn.train.plan.cluster import Cluster, DeviceGroup, Link
from mxn.train.plan.events import simulate
from mxn.train.plan.picture import plan_svg
from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.plan.profile import ChipProfile, LayerCost
from mxn.train.plan.schedules import order
from mxn.train.plan.shape import LayerShape, ModelShape
from mxn.train.plan.simulate import Simulation, simulate_plan
from mxn.train.plan.times import Hop, PipelineTimes

_BLOCKS = 80
_SEQ = 4096
_TP = 8
_NODE = Link(latency_s=1e-5, bytes_per_s=2e11)
_NET = Link(latency_s=2e-5, bytes_per_s=2e10)
_SLOW = Link(latency_s=5e-5, bytes_per_s=1e10)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    check()
    metrics: dict[str, Any] = {}
    for name, actions, run in cases():
        run()  # warm-up: orders are kept between runs, as a planner would
        seconds = [cpu_s(run) for _ in range(options.repeats)]
        cuts = statistics.quantiles(seconds, n=10)
        low, middle, high = cuts[1], cuts[4], cuts[7]
        metrics[name] = {
            "p20": round(low, 4), "p50": round(middle, 4), "p80": round(high, 4), "unit": "s",
            "actions": actions,
        }  # fmt: skip
        rate = f", {actions / middle / 1e6:.2f} M actions/s" if actions else ""
        print(f"{name:56} {low:8.3f} {middle:8.3f} {high:8.3f} s{rate}")
    text = json.dumps(document(metrics, options.repeats))
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


def check() -> None:
    """Raises: SystemExit when a simulated step differs from its closed form."""
    times = PipelineTimes.even(16, forward_s=1.0, backward_s=2.0)
    for schedule, want in (("1f1b", (64 + 15) * 3), ("zero-bubble", 64 * 3 + 15)):
        got = simulate(order(schedule, 16, 1, 64), times).makespan_s
        if abs(got - want) > 1e-6:
            raise SystemExit(f"{schedule} takes {got} s, its closed form is {want} s")


def cpu_s(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def cases() -> list[tuple[str, int, Callable[[], object]]]:
    """Return name, number of actions and the call of each case."""
    deep = PipelineTimes.even(64, forward_s=1.0, backward_s=2.0, hop=Hop(0.01))
    chunked = PipelineTimes.even(16, forward_s=1.0, backward_s=2.0, num_chunks=4, hop=Hop(0.01))
    small = PipelineTimes.even(16, forward_s=1.0, backward_s=2.0, hop=Hop(0.5))
    mixed, mixed_shape, mixed_cluster = ten_thousand(different=True)
    alike, _, _ = ten_thousand(different=False)
    drawn = simulate_plan(alike, mixed_shape, mixed_cluster, PROFILES)
    count = sum(2 * 10 * pipeline.micro_batches for pipeline in mixed.pipelines)

    def whole(plan: TrainPlan) -> Simulation:
        return simulate_plan(plan, mixed_shape, mixed_cluster, PROFILES)

    return [
        (
            "1f1b, 64 stages, 512 micro-batches",
            64 * 512 * 2,
            lambda: simulate(order("1f1b", 64, 1, 512), deep),
        ),
        (
            "zero-bubble, 64 stages, 512 micro-batches",
            64 * 512 * 3,
            lambda: simulate(order("zero-bubble", 64, 1, 512), deep),
        ),
        (
            "interleaved, 16 stages of 4 chunks, 128 micro-batches",
            16 * 4 * 128 * 2,
            lambda: simulate(order("interleaved", 16, 4, 128), chunked),
        ),
        ("10,000 devices: 125 different pipelines of 10 stages", count, lambda: whole(mixed)),
        ("10,000 devices: 125 pipelines, 2 kinds", 2 * 2 * 10 * 64, lambda: whole(alike)),
        (
            "best order of 16 uneven-link stages, 64 micro-batches",
            0,
            lambda: best_order(small, 64, [24] * 16, splits_weights=True),
        ),
        ("picture of 2 pipelines of 10 stages", 0, lambda: plan_svg(drawn)),
    ]


def _profile(chip: str, seconds: float) -> ChipProfile:
    cost = LayerCost(forward_s=seconds, backward_s=2 * seconds, optimizer_s=0.001)
    kinds = ("embedding", "block", "head")
    return ChipProfile(chip=chip, costs={(kind, 1, _TP): cost for kind in kinds}, basis="simulated")


PROFILES = {"one": _profile("one", 0.004), "other": _profile("other", 0.006)}


def ten_thousand(different: bool) -> tuple[TrainPlan, ModelShape, Cluster]:
    """Return 125 pipelines of ten stages of eight devices, of two chips, with uneven cuts."""
    pipelines = []
    for number in range(125):
        kind = number if different else number % 2
        ends = [8 * s + (s + kind) % 3 for s in range(1, 10)] + [_BLOCKS + 2]
        chunks = [Chunk(first=a, end=b) for a, b in zip([0, *ends], ends, strict=False)]
        stages = tuple(
            Stage(
                group="a" if s < 5 else "b",
                first_device=number * 40 + (s % 5) * _TP,
                chunks=(chunk,),
                tp=_TP,
            )
            for s, chunk in enumerate(chunks)
        )
        batches = 2 + number if different else 64
        pipelines.append(Pipeline(stages=stages, micro_batches=batches))
    groups = tuple(
        DeviceGroup(
            name=name,
            chip=chip,
            num_devices=5000,
            devices_per_node=8,
            memory_bytes=64 * 2**30,
            node_link=_NODE,
            group_link=_NET,
        )
        for name, chip in (("a", "one"), ("b", "other"))
    )
    layer = {"params": 850_000_000, "forward_flop": 1.7e9, "activation_bytes": 3e5,
             "output_bytes": 16384.0}  # fmt: skip
    kinds = ["embedding", *["block"] * _BLOCKS, "head"]
    shape = ModelShape(
        name="70b-like",
        layers=tuple(LayerShape(kind=kind, **layer) for kind in kinds),
        seq_tokens=_SEQ,
    )
    plan = TrainPlan(
        model="70b-like",
        num_layers=_BLOCKS + 2,
        seq_tokens=_SEQ,
        micro_batch=1,
        pipelines=tuple(pipelines),
    )
    return plan, shape, Cluster(groups=groups, links={("a", "b"): _SLOW})


def document(metrics: dict[str, Any], repeats: int) -> dict[str, Any]:
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return {
        "schema": 1,
        "case": "train-simulate",
        "git": commit.stdout.strip(),
        "dirty": bool(changes.stdout.strip()),
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "os": platform.platform(),
        },
        "versions": {"python": platform.python_version()},
        "params": {"repeats": repeats},
        "metrics": metrics,
        "basis": "measured",
    }


if __name__ == "__main__":
    main()
