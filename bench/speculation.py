"""What guessing tokens brings: tokens per second and acceptance, with and without.

    python bench/speculation.py [--model DIRECTORY] [--weights int8] [--rounds 5]

Runs interleave, so that a machine that slows down slows all of them. Prints medians for people,
then one line of JSON. The answers of all kinds are compared: they must be the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from mxn.engine.config import EngineConfig
from mxn.engine.local import LocalEngine
from mxn.engine.protocol import EngineStats, SamplingParams
from mxn.errors import InternalError
from mxn.models.catalogue import shipped_dir
from mxn.models.tokenizer import Tokenizer

REPEATED = "MENENIUS:\nThe belly answer'd, and the belly smiled, and all the members wept.\n\n" * 6
PROMPTS = {
    "repeated": [REPEATED],
    "free": ["ROMEO:\nWhat light"],
    "free x4": ["ROMEO:\nWhat light", "To be", "KING HENRY:\nNow", "MENENIUS:\nGood friends"],
}
RULES = {"greedy": {"temperature": 0.0}, "drawn": {"temperature": 0.8, "seed": 3}}
KINDS = ("off", "ngram")


def load(model: str, weights: str, speculation: str, threads: int) -> LocalEngine:
    return LocalEngine.load(
        EngineConfig(
            model=model, weights=weights, device="cpu", speculation=speculation, threads=threads,
            max_sequences=8, max_batch_tokens=512, prefix_caching=False,
        )
    )  # fmt: skip


def run(
    engine: LocalEngine, prompts: list[list[int]], sampling: SamplingParams
) -> tuple[float, list[list[int]]]:
    """Return generated tokens per second, the prompt included, and the answers."""
    started_s = time.perf_counter()
    answers = [answer.token_ids for answer in engine.generate(prompts, sampling)]
    return sum(map(len, answers)) / (time.perf_counter() - started_s), answers


def since(after: EngineStats, before: EngineStats) -> dict[str, int]:
    names = ("drafts_total", "draft_tokens_total", "accepted_draft_tokens_total", "steps_total")
    return {name: getattr(after, name) - getattr(before, name) for name in names}


def measure(
    engines: dict[str, LocalEngine],
    prompts: list[list[int]],
    sampling: SamplingParams,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Return for each kind its median speed and what its last round counted."""
    speeds: dict[str, list[float]] = {kind: [] for kind in engines}
    counted: dict[str, dict[str, int]] = {}
    for _ in range(rounds):
        answers = []
        for kind, engine in engines.items():
            before = engine.stats()
            speed, tokens = run(engine, prompts, sampling)
            speeds[kind].append(speed)
            answers.append(tokens)
            counted[kind] = since(engine.stats(), before)
        if any(one != answers[0] for one in answers):
            raise InternalError(f"guessing changed an answer: {answers}")
    return {
        kind: {"tokens_per_s": statistics.median(speeds[kind]), **counted[kind]} for kind in engines
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(shipped_dir() / "mxn-shakespeare-dsv3"))
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    tokenizer = Tokenizer.load(Path(given.model))
    engines = {kind: load(given.model, given.weights, kind, given.threads) for kind in KINDS}
    rows = []
    for case, texts in PROMPTS.items():
        prompts = [tokenizer.encode(text) for text in texts]
        for name, rules in RULES.items():
            sampling = SamplingParams(max_tokens=given.tokens, ignore_eos=True, **rules)
            found = measure(engines, prompts, sampling, given.rounds)
            off, on = found["off"], found["ngram"]
            gain = on["tokens_per_s"] / off["tokens_per_s"]
            accepted = on["accepted_draft_tokens_total"] / max(1, on["draft_tokens_total"])
            rows.append({"case": case, "rules": name, "gain": gain, "accepted": accepted, **found})
            print(
                f"{case:9} {name:7} off {off['tokens_per_s']:7.0f} tok/s  "
                f"ngram {on['tokens_per_s']:7.0f} tok/s  {gain:.2f}x  "
                f"accepted {accepted:.0%} of {on['draft_tokens_total']}, "
                f"steps {off['steps_total']} -> {on['steps_total']}"
            )
    print(
        json.dumps(
            {"schema": 1, "case": "speculation", "basis": "measured", "model": given.model,
             "weights": given.weights, "threads": given.threads, "rows": rows}
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
