"""How much of a step is ours: all but the forward pass, which is replaced by nothing.

    python bench/engine/overhead.py
    python bench/engine/overhead.py --sequences 1,8 --model FOLDER   # another packed checkpoint

Two columns: `hot`, with a pass that returns at once, and `cold`, with one that reads 64 MiB, as a
real one does: what the loop needs of code and data has then left the processor's caches, and the
same instructions take several times as long. Medians for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from mxn.engine.config import EngineConfig
from mxn.engine.local import LocalEngine
from mxn.engine.protocol import Generate, SamplingParams

SHIPPED = Path(__file__).parents[2] / "src/mxn/shipped/mxn-shakespeare-llama"
WARM_UP_STEPS = 20
PROMPT_TOKENS = 100
FLUSH_BYTES = 64 << 20
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}


class Instant:
    """Stands in for the native decoder: leaves the logits as they are, and notes its own time."""

    def __init__(self, *, is_cold: bool) -> None:
        self._flush = np.ones(FLUSH_BYTES // 8, dtype=np.int64) if is_cold else None
        self.spent_s = 0.0

    def forward(self, *_: Any) -> None:
        if self._flush is not None:
            started_s = time.perf_counter()
            self._flush.sum()
            self.spent_s = time.perf_counter() - started_s


def measure(
    model: str, num_sequences: int, sampling: dict[str, Any], *, is_cold: bool, num_steps: int
) -> list[float]:
    """Return the seconds of each decode step, encoded for the wire, without the forward pass."""
    config = EngineConfig(
        model=model, device="cpu", weights="int8", threads=1, max_context=1024, kv_bytes=256 << 20
    )
    engine = LocalEngine.load(config)
    core = engine.core
    params = SamplingParams(
        max_tokens=num_steps + WARM_UP_STEPS, ignore_eos=True, seed=7, **sampling
    )
    for i in range(num_sequences):
        prompt = [1 + (i * 37 + j) % 999 for j in range(PROMPT_TOKENS + i % 16)]
        core.handle(Generate(request_id=f"request-{i}", prompt_ids=prompt, sampling=params))
    while not core.stats().generation_tokens_total or core.stats().num_waiting:
        core.step()
    stub = core._runner._model._native = Instant(is_cold=is_cold)  # logits stay the last ones
    encoder, times = msgspec.msgpack.Encoder(), []
    while core.has_work:
        started_s = time.perf_counter()
        encoder.encode(core.step())
        times.append(time.perf_counter() - started_s - stub.spent_s)
    return sorted(times[WARM_UP_STEPS : WARM_UP_STEPS + num_steps - 20])


def _quantiles(times_s: list[float]) -> dict[str, float]:
    return {f"p{q}": times_s[len(times_s) * q // 100] * 1e3 for q in (20, 50, 80)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(SHIPPED))
    parser.add_argument("--sequences", default="1,8,32")
    parser.add_argument("--samplings", default="greedy,drawn,top-p,logprobs")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'ms a step':24}{'hot':>10}{'cold':>10}")
    for name in args.samplings.split(","):
        for num_sequences in map(int, args.sequences.split(",")):
            row: dict[str, Any] = {"sampling": name, "sequences": num_sequences}
            for column, is_cold in (("hot", False), ("cold", True)):
                times = measure(
                    args.model, num_sequences, SAMPLINGS[name], is_cold=is_cold,
                    num_steps=args.steps,
                )  # fmt: skip
                row[column] = _quantiles(times)
            rows.append(row)
            medians = "".join(f"{row[column]['p50']:10.3f}" for column in ("hot", "cold"))
            print(f"{name:12}{num_sequences:3} at once {medians}")
    print(json.dumps({"schema": 1, "case": "engine_overhead", "basis": "measured", "rows": rows}))


if __name__ == "__main__":
    main()
