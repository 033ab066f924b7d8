"""What the bridge and the runtime cost on this machine, over loopback.

    python bench/train/bridge.py [--quick] [links] [sums] [runtime]

links    one-way time and rate of messages, against a raw gloo send between the same processes
sums     a sum over two islands, against one all-reduce by gloo
runtime  a job of one rank against the single trainer; how long stages of a pipeline wait

Raw and bridged are interleaved in one run. The last line is one JSON document. Loopback and two
busy cores: fractions mean something, seconds are this machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20)
ROUTES = {
    "one island": (["cpu", "cpu"], [None, None], {}),
    "two islands": (["cpu", "cpu"], ["a", "b"], {}),
    "two islands, bf16": (["cpu", "cpu"], ["a", "b"], {"wire_dtype": "bfloat16"}),
    "cpu and sim": (["cpu", "sim:0"], [None, None], {}),
}
TIMEOUT_S = 280


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank_main(json.loads(arguments.rank))
        return
    repeats = 5 if arguments.quick else 15
    parts: dict[str, Callable[[int], dict[str, Any]]] = {
        "links": links,
        "sums": sums,
        "runtime": runtime,
    }
    chosen = arguments.parts or list(parts)
    print_document({name: parts[name](repeats) for name in chosen}, repeats)


def links(repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    print(f"{'route':20s} {'bytes':>10s} {'raw us':>9s} {'bridge us':>10s} {'rate':>8s} of raw")
    for route, (devices, islands, options) in ROUTES.items():
        rows = run("time_links", devices, {"repeats": repeats}, islands, options)[0]
        for row in rows:
            print(
                f"{route:20s} {row['bytes']:>10d} {row['raw_us']:>9.0f} {row['bridge_us']:>10.0f} "
                f"{row['bridge_gb_per_s']:>8.2f} {row['rate_fraction']:.2f}"
            )
        found[route] = rows
    return found


def sums(repeats: int) -> dict[str, Any]:
    found = {}
    for route in ("one island", "two islands", "two islands, bf16", "cpu and sim"):
        devices, islands, options = ROUTES[route]
        found[route] = run("time_sums", devices, {"repeats": repeats}, islands, options)[0]
        print(f"sum of 16 MiB, {route:20s} {found[route]}")
    return found


def runtime(repeats: int) -> dict[str, Any]:
    steps = 4 * repeats
    found = {"one rank": run("time_one_rank", ["cpu"], {"steps": steps})[0]}
    print("one rank", found["one rank"])
    for schedule in ("1f1b", "zero-bubble"):
        ranks = run("time_pipeline", ["cpu", "cpu"], {"steps": steps // 2, "schedule": schedule})
        found[f"two stages {schedule}"] = ranks
        print("two stages", schedule, ranks)
    return found


# -- ranks ----------------------------------------------------------------------------------------


def run(
    function: str,
    devices: list[str],
    arguments: dict[str, Any],
    islands: list[str | None] | None = None,
    options: dict[str, Any] | None = None,
) -> list[Any]:
    """Run a function of this file in a process per device; return what each gave."""
    from mxn.train.run.bridge import serve_store

    store, address = serve_store()
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank, device in enumerate(devices):
            task = {
                "function": function, "arguments": arguments, "address": address, "rank": rank,
                "size": len(devices), "device": device, "options": options or {},
                "island": islands[rank] if islands else None, "out": f"{folder}/{rank}",
            }  # fmt: skip
            command = [sys.executable, __file__, "--rank", json.dumps(task)]
            variables = os.environ | {"OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(command, env=variables))
        try:
            codes = [process.wait(TIMEOUT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise SystemExit(f"ranks of {function} ended with {codes}")
        results = [json.loads(Path(f"{folder}/{rank}").read_text()) for rank in range(len(devices))]
    del store
    return results


def rank_main(task: dict[str, Any]) -> None:
    import torch

    from mxn.chips import find_device
    from mxn.train.run.bridge import Bridge, BridgeOptions

    torch.set_num_threads(1)
    device = find_device(task["device"])
    bridge = Bridge.connect(
        task["address"], task["rank"], task["size"], device,
        island=task["island"], options=BridgeOptions(**task["options"]),
    )  # fmt: skip
    result = globals()[task["function"]](bridge, **task["arguments"])
    bridge.close()
    Path(task["out"]).write_text(json.dumps(result))


def time_links(bridge: Any, repeats: int) -> list[dict[str, float]]:
    import torch

    rows = []
    for size in SIZES:
        host, own = (torch.zeros(size // 4, device=place) for place in ("cpu", bridge.device))
        spent: dict[str, list[float]] = {"raw": [], "bridge": []}
        for number in range(repeats + 1):
            for name, once, tensor in (("raw", _raw_round, host), ("bridge", _round, own)):
                bridge.barrier()
                begin = time.perf_counter()
                for _ in range(4):
                    once(bridge, tensor)
                if number:  # the first one warms up
                    spent[name].append((time.perf_counter() - begin) / 8)
        raw_s, bridge_s = (statistics.median(spent[name]) for name in ("raw", "bridge"))
        rows.append(
            {
                "bytes": size,
                "raw_us": raw_s * 1e6,
                "bridge_us": bridge_s * 1e6,
                "bridge_gb_per_s": size / bridge_s / 1e9,
                "rate_fraction": raw_s / bridge_s,
            }
        )
    return rows


def _raw_round(bridge: Any, tensor: Any) -> None:
    """There and back by gloo alone."""
    group, peer = bridge.world, 1 - bridge.rank
    if bridge.rank == 0:
        group.send([tensor], peer, 1).wait()
        group.recv([tensor], peer, 2).wait()
    else:
        group.recv([tensor], peer, 1).wait()
        group.send([tensor], peer, 2).wait()


def _round(bridge: Any, tensor: Any) -> None:
    import torch

    shape, peer = tuple(tensor.shape), 1 - bridge.rank
    if bridge.rank == 0:
        sent = bridge.send(tensor, peer, 3)
        bridge.recv(shape, torch.float32, peer, 4).wait()
    else:
        got = bridge.recv(shape, torch.float32, peer, 3).wait()
        sent = bridge.send(got, peer, 4)
    sent.wait()


def time_sums(bridge: Any, repeats: int) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    ranks = list(range(bridge.size))
    bridge.open_sums([ranks])
    host, own = (torch.zeros(4 << 20, device=place) for place in ("cpu", bridge.device))
    spent: dict[str, list[float]] = {"raw": [], "bridge": []}
    for number in range(repeats + 1):
        for name in spent:
            bridge.barrier()
            begin = time.perf_counter()
            if name == "raw":
                dist.all_reduce(host, group=bridge.world)
            else:
                bridge.sum_(own, ranks).wait()
            if number:
                spent[name].append(time.perf_counter() - begin)
    raw_s, bridge_s = (statistics.median(spent[name]) for name in ("raw", "bridge"))
    return {"raw_ms": raw_s * 1e3, "bridge_ms": bridge_s * 1e3, "fraction": raw_s / bridge_s}


def _job(steps: int, micro_batches: int) -> tuple[Any, Any, Any]:
    from mxn.models.tokenizer import Tokenizer
    from mxn.train.run.data import DataSettings, Rows, prepare
    from mxn.train.run.schedule import Schedule
    from mxn.train.run.single import RunSettings
    from mxn.train.run.weights import ModelSource

    model = ROOT / "src/mxn/shipped/mxn-shakespeare-llama"
    text = ROOT / "recipes/data/tinyshakespeare.txt"
    source = ModelSource.open(model, seq_tokens=128)
    cache = prepare(DataSettings(paths=(text,)), Tokenizer.load(model), source.spec.vocab_size)
    rows = Rows(cache, seq_tokens=128, micro_batch=4)
    schedule = Schedule(peak=1e-3, num_steps=steps)
    return source, rows, RunSettings(schedule=schedule, micro_batches=micro_batches)


def _plan(cuts: list[tuple[int, int]], micro_batches: int, schedule: str) -> Any:
    from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan

    stages = tuple(
        Stage(group="cpu", first_device=number, chunks=(Chunk(first=first, end=end),))
        for number, (first, end) in enumerate(cuts)
    )
    pipeline = Pipeline(stages=stages, micro_batches=micro_batches)
    return TrainPlan(
        model="shakespeare", num_layers=6, seq_tokens=128, micro_batch=4,
        pipelines=(pipeline,), schedule=schedule,
    )  # fmt: skip


def _trainer(bridge: Any, steps: int, plan: Any) -> Any:
    import torch

    from mxn.train.run.placement import Placement
    from mxn.train.run.trainer import RankTrainer

    job = _job(steps, plan.micro_batches)
    return RankTrainer(*job, Placement(plan), bridge, dtypes=[torch.float32] * bridge.size)


def time_one_rank(bridge: Any, steps: int) -> dict[str, float]:
    """The same steps by the single trainer and by a rank of one, in turn; CPU seconds of each."""
    from mxn.train.run.single import SingleTrainer

    single = SingleTrainer(*_job(steps, 4))
    ranked = _trainer(bridge, steps, _plan([(0, 6)], 4, "1f1b"))
    spent: dict[str, list[float]] = {"single": [], "rank": []}
    for number in range(steps):
        for name, trainer in (("single", single), ("rank", ranked)):
            begin = time.process_time()
            trainer.train_step()
            if number:
                spent[name].append(time.process_time() - begin)
    single_s, rank_s = (statistics.median(spent[name]) for name in ("single", "rank"))
    return {"single_s": single_s, "rank_s": rank_s, "overhead": rank_s / single_s - 1}


def time_pipeline(bridge: Any, steps: int, schedule: str) -> dict[str, float]:
    """Two stages, sixteen micro-batches: what share of the time each stage stands still."""
    trainer = _trainer(bridge, steps, _plan([(0, 4), (4, 6)], 16, schedule))
    trainer.train_step()
    cpu = time.process_time()
    told = [trainer.train_step() for _ in range(steps - 1)]
    cpu = time.process_time() - cpu
    total = sum(step.log.seconds for step in told)
    mine = [step.times[bridge.rank] for step in told]
    return {
        "step_s": total / len(told),
        "busy": sum(times.busy_s for times in mine) / total,
        "waited": sum(times.waited_s for times in mine) / total,
        "reduced": sum(times.reduce_s for times in mine) / total,
        "cpu_s_per_step": cpu / len(told),
    }


def print_document(metrics: dict[str, Any], repeats: int) -> None:
    import torch

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    print(
        json.dumps(
            {
                "schema": "mxn.bench/1",
                "case": "train/bridge",
                "git": git("rev-parse", "--short", "HEAD"),
                "dirty": bool(git("status", "--porcelain")),
                "machine": {"cpu": platform.processor(), "cores": os.cpu_count()},
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                "params": {"repeats": repeats},
                "metrics": metrics,
                "basis": "measured; anything on sim is simulated",
            }
        )
    )


if __name__ == "__main__":
    main()
