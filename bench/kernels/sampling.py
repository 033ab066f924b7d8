"""Choosing tokens from rows of logits: C++ against torch, ms a row, taking turns.

    python bench/kernels/sampling.py

A row has 151,936 logits in bfloat16's steps. The n-th largest is about 12 - 1.3 ln n, as in a
model's rows, so that top-p 0.9 keeps some hundred tokens; those of `wide` rows are normal numbers
times 3 (it keeps ten thousand), of `flat` rows normal numbers times 0.1 (nearly all). Parity first.
Medians for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from mxn.kernels.native.library import use_threads
from mxn.kernels.params import ChoiceRule, LogitEdit
from mxn.kernels.parity import check_kernel
from mxn.kernels.registry import kernels_of

VOCAB = 151_936
PENALIZED = 1000
RULES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-k 20": {"top_k": 20},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 20, top-p 0.95": {"top_k": 20, "top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
    "penalties of 1000": {"temperature": 0.0},
    "wide, top-p 0.9": {"top_p": 0.9},
    "flat, top-p 0.9": {"top_p": 0.9},
}
KERNELS = ("native", "torch")


def _call(name: str, rows: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, VOCAB, generator=generator) * (0.1 if "flat" in name else 3.0)
    if "flat" not in name and "wide" not in name:
        ranks = torch.rand(rows, VOCAB, generator=generator).argsort(1) + 1
        logits = 12 - 1.3 * ranks.log() + 0.1 * logits
    logits = logits.bfloat16().float()
    rule = ChoiceRule(**({"temperature": 0.8} | RULES[name]))
    rules = [rule._replace(uniform=(r + 0.5) / rows) for r in range(rows)]
    edits = []
    if "penalties" in name:
        ids = np.arange(PENALIZED) * 100
        amounts = np.ones(PENALIZED, np.float32)
        edits = [LogitEdit(r, ids, 1.1, amounts) for r in range(rows)]
    return logits, VOCAB, rules, edits


def measure(name: str, rows: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return p20, p50, p80 of each kernel, in ms a row."""
    call = _call(name, rows)
    times: dict[str, list[float]] = {kernel: [] for kernel in KERNELS}
    for turn in range(repeats + 3):
        for kernel in KERNELS:
            started_s = time.perf_counter()
            kernels_of("choose")[kernel].fn(*call)
            if turn >= 3:
                times[kernel].append((time.perf_counter() - started_s) / rows * 1e3)
    return {kernel: _quantiles(found) for kernel, found in times.items()}


def _quantiles(times_ms: list[float]) -> dict[str, float]:
    parts = statistics.quantiles(times_ms, n=10)
    return {"p20": parts[1], "p50": parts[4], "p80": parts[7]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--rows", default="1,8,32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    use_threads(args.threads)
    for kernel in KERNELS:
        result = check_kernel(kernels_of("choose")[kernel], torch.device("cpu"), torch.float32)
        if not result.is_passed:
            raise SystemExit(f"{kernel} is wrong: {result.failures[0]}")
    table = []
    print(f"{'ms a row':24}{'rows':>5}{'native':>10}{'torch':>10}")
    for name in RULES:
        for rows in map(int, args.rows.split(",")):
            times = measure(name, rows, args.repeats)
            table.append({"rule": name, "rows": rows, "threads": args.threads, "ms": times})
            medians = "".join(f"{times[kernel]['p50']:10.3f}" for kernel in KERNELS)
            print(f"{name:24}{rows:5}{medians}")
    print(json.dumps({"schema": 1, "case": "sampling", "basis": "measured", "rows": table}))


if __name__ == "__main__":
    main()
