"""How much of a step is ours: all but the forward pass, with a model that returns at once.

    python bench/engine_overhead.py

Prints medians for people, then one line of JSON.
"""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
import torch

from mxn.engine.config import EngineConfig
from mxn.engine.local import LocalEngine
from mxn.engine.protocol import Generate, SamplingParams

WARM_UP_STEPS = 10
CASES: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {"temperature": 0.0}),
    (16, {"temperature": 0.0}),
    (64, {"temperature": 0.0}),
    (16, {"temperature": 1.0}),
    (16, {"temperature": 1.0, "top_p": 0.9}),
    (16, {"temperature": 0.0, "logprobs": 5}),
)


def measure(num_sequences: int, sampling: dict[str, Any], *, num_steps: int = 300) -> list[float]:
    """Return the seconds of each decode step, encoded for the wire, without the forward pass."""
    config = EngineConfig(model="tiny", loader="mxn.engine.testing:load_tiny", threads=1)
    engine = LocalEngine.load(config)
    logits_SV = torch.randn(num_sequences, engine.core.info.vocab_size)
    model = engine.core._runner._model
    model.forward = lambda batch, cache: logits_SV[: batch.attention.num_sequences]
    params = SamplingParams(max_tokens=num_steps, ignore_eos=True, **sampling)
    for i in range(num_sequences):
        prompt = list(range(1, 201))
        engine.core.handle(Generate(request_id=f"r{i}", prompt_ids=prompt, sampling=params))
    encoder, times = msgspec.msgpack.Encoder(), []
    while engine.core.has_work:
        started_s = time.perf_counter()
        encoder.encode(engine.core.step())
        times.append(time.perf_counter() - started_s)
    return sorted(times[WARM_UP_STEPS:])


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for num_sequences, sampling in CASES:
        times = measure(num_sequences, sampling)
        quantiles = {f"p{q}": times[len(times) * q // 100] * 1e3 for q in (20, 50, 80)}
        rows.append({"sequences": num_sequences, "sampling": sampling, "ms": quantiles})
        print(f"{num_sequences:3} sequences, {sampling}: {quantiles['p50']:.3f} ms")
    print(json.dumps({"schema": 1, "case": "engine_overhead", "basis": "measured", "rows": rows}))


if __name__ == "__main__":
    main()
