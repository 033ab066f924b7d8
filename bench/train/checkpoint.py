"""What checkpoints cost a job: how long steps stand still, and how much slower they are beside.

    python bench/train/checkpoint.py [--mib 192] [--rounds 8]

One process trains a stack of linear layers whose masters and moments have so many MiB. Steps
without a checkpoint and steps while one is written take turns. Were it not written beside, a job
would stand still for `write_s`. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mxn.train.run.checkpoint import Checkpointer, Position, find
from mxn.train.run.checkpoint.writer import Identity

WIDTH = 1024
LAYER_BYTES = 3 * 4 * WIDTH * WIDTH  # master and two moments
STEPS = 3  # timed of each kind, per round


class Work:
    """Steps that read and write every weight, as training does."""

    def __init__(self, num_layers: int) -> None:
        self.layers = {
            layer: {
                f"weight.{name}": torch.randn(WIDTH, WIDTH) * 0.01
                for name in ("master", "exp_avg", "exp_avg_sq")
            }
            for layer in range(num_layers)
        }
        self.x = torch.randn(96, WIDTH)

    def step(self) -> float:
        began = time.perf_counter()
        x = self.x
        for tensors in self.layers.values():
            x = torch.tanh(x @ tensors["weight.master"])
            gradient = x.t() @ x
            tensors["weight.exp_avg"].lerp_(gradient, 0.1)
            tensors["weight.exp_avg_sq"].mul_(0.95).addcmul_(gradient, gradient, value=0.05)
            tensors["weight.master"].add_(tensors["weight.exp_avg"], alpha=-1e-6)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=192, help="of state on this rank")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = Work(max(1, (options.mib << 20) // LAYER_BYTES))
    state_bytes = len(work.layers) * LAYER_BYTES
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(work, Path(folder), options.rounds)
    metrics = {name: _spread(values) for name, values in rows.items()}
    for name, told in metrics.items():
        print(f"{name:34} {told['p50']:.4f} (p20 {told['p20']:.4f}, p80 {told['p80']:.4f})")
    rate = state_bytes / metrics["write_s"]["p50"] / 1e6
    print(f"{state_bytes / 2**20:.0f} MiB: {rate:.0f} MB/s to the disk, checksums included")
    print(
        json.dumps(
            {
                "schema": 1,
                "case": "train-checkpoint",
                "machine": {"cpu": platform.processor(), "cores": os.cpu_count()},
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                "params": vars(options) | {"state_bytes": state_bytes},
                "metrics": metrics,
                "basis": "measured",
            }
        )
    )


def measure(work: Work, folder: Path, rounds: int) -> dict[str, list[float]]:
    rows: dict[str, list[float]] = {
        "step_s": [], "step_beside_a_write_s": [], "stall_s": [], "write_s": [],
        "stall_share_of_write": [], "slowdown_of_steps_beside": [],
    }  # fmt: skip
    who = Identity(
        job="j", plan="p", plan_json="{}", num_layers=len(work.layers), num_ranks=1, launch=1
    )
    writer = Checkpointer(folder, rank=0, identity=who, keep=1)
    work.step()
    for number in range(rounds + 1):
        calm = statistics.median(work.step() for _ in range(STEPS))
        before = writer.costs.copy_s + writer.costs.wait_s
        written = writer.costs.write_s
        writer.save(Position(step=number + 1, micro_batch=0), work.layers)
        stall = writer.costs.copy_s + writer.costs.wait_s - before
        beside = []
        while writer.is_writing() or not beside:
            beside.append(work.step())
        writer.close()
        if number == 0:
            continue  # buffers are made in the first
        write = writer.costs.write_s - written
        for name, value in zip(
            rows,
            (calm, statistics.median(beside), stall, write, stall / write,
             statistics.median(beside) / calm - 1),
            strict=True,
        ):  # fmt: skip
            rows[name].append(value)
    stored = find(folder, "newest")
    assert stored is not None
    assert stored.manifest.position.step == rounds + 1
    return rows


def _spread(values: list[float]) -> dict[str, Any]:
    low, middle, high = (statistics.quantiles(values, n=10)[at] for at in (1, 4, 7))
    return {"p20": low, "p50": middle, "p80": high, "n": len(values)}


if __name__ == "__main__":
    main()
