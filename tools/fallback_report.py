"""Tries every decoder architecture of transformers through the fallback; writes what became of it.

Builds a tiny random checkpoint for each model type, loads it with `prefer_fallback`, compares
float32 logits (prefill, decode with cache, mixed batch) and greedy tokens with transformers, and
writes docs/reference/fallback.md and a JSON file. Each architecture has a process and a time limit
of its own.

    python tools/fallback_report.py [--only gpt_neox,opt] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "fallback.md"
LIMIT_S = 150

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MXN_KERNEL_TUNING", "off")
sys.path.insert(0, str(ROOT / "tests"))


def main() -> int:
    options = parse_options()
    from support import any_decoder

    chosen = options.only.split(",") if options.only else any_decoder.model_types()
    start = time.perf_counter()
    outcomes = run_all(chosen, options.workers)
    print(summary(outcomes), f"in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if options.only and options.json and options.json.is_file():
        fresh = {outcome["model_type"]: outcome for outcome in outcomes}
        known = json.loads(options.json.read_text())
        outcomes = [fresh.get(outcome["model_type"], outcome) for outcome in known]
    if options.json:
        options.json.write_text(json.dumps(outcomes, indent=1) + "\n")
    if not options.only or len(outcomes) > len(chosen):
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(outcomes))
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="model types, separated by commas; renews their rows")
    parser.add_argument("--json", type=Path, help="outcomes; with --only, a file to be renewed")
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


def run_all(model_types: list[str], workers: int) -> list[dict[str, Any]]:
    """Return the outcome of each model type, in their order."""
    import torch
    import transformers
    from transformers import LlamaForCausalLM  # noqa: F401  and with it what all models import

    from mxn.kernels.registry import kernels_of
    from support import fallback_parity  # noqa: F401  loaded once: every worker is a fork of this

    kernels_of("linear")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run_one, model_types))


def run_one(model_type: str) -> dict[str, Any]:
    """Judge one model type in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=judge, args=(model_type, sender))
    process.start()
    sender.close()
    start = time.perf_counter()
    try:
        found = receiver.poll(LIMIT_S)
        result = receiver.recv() if found else failed(model_type, f"took over {LIMIT_S} s")
    except EOFError:
        process.join()
        result = failed(model_type, f"its process ended with code {process.exitcode}")
    process.kill()
    process.join()
    took = f"{time.perf_counter() - start:4.1f} s"
    print(took, result["status"], model_type, clean(result["reason"]), file=sys.stderr, flush=True)
    return result


def judge(model_type: str, sender: Any) -> None:
    import warnings

    from mxn.chips import find_device
    from support.fallback_parity import measure

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as directory:
        try:
            result = measure(model_type, Path(directory), find_device("cpu")).to_json()
        except Exception as error:  # the report says it; nothing is hidden
            result = failed(model_type, f"{type(error).__name__}: {error}")
    sender.send(result)
    sender.close()


def failed(model_type: str, reason: str) -> dict[str, Any]:
    from support import any_decoder

    name = any_decoder.model_class(model_type).__name__
    return {
        "model_type": model_type, "architecture": name, "status": "failed", "reason": reason,
        "errors": {}, "max_context": 0,
    }  # fmt: skip


def summary(outcomes: list[dict[str, Any]]) -> str:
    count = Counter(outcome["status"] for outcome in outcomes)
    classes = {o["architecture"] for o in outcomes if o["status"] == "runs"}
    return (
        f"{count['runs']} of {len(outcomes)} model types run ({len(classes)} classes),"
        f" {count['refused']} refused, {count['failed']} not judged"
    )


def page(outcomes: list[dict[str, Any]]) -> str:
    import torch
    import transformers

    runs = [o for o in outcomes if o["status"] == "runs"]
    refused = [o for o in outcomes if o["status"] == "refused"]
    broken = [o for o in outcomes if o["status"] == "failed"]
    lines = [
        "# Decoders that run through the transformers fallback",
        "",
        "Written by `python tools/fallback_report.py`; do not edit. Every model type with a causal",
        f"language model in transformers {transformers.__version__} (torch"
        f" {torch.__version__.split('+')[0]}) was tried with a tiny random checkpoint on the CPU in"
        " float32.",
        "",
        f"**{summary(outcomes)}.** Basis: measured.",
        "",
        "*Runs* means: logits over the paged cache are within 1e-4 of transformers' own, relative",
        "to the largest logit, for prefill, decode with cache and a batch of mixed lengths, and 16",
        "greedy tokens are the same. Families that mxn has a spec for run natively instead; here",
        "they were forced through the fallback. A refused model is refused at load with the",
        "reason given.",
        "",
        "## Runs",
        "",
        "| model type | class | prefill | decode | batch |",
        "|---|---|---|---|---|",
        *(runs_row(o) for o in runs),
        "",
        "## Refused",
        "",
        "| model type | class | reason |",
        "|---|---|---|",
        *(f"| {o['model_type']} | {o['architecture']} | {clean(o['reason'])} |" for o in refused),
        "",
    ]
    if broken:
        lines += [
            "## Not judged",
            "",
            "No tiny checkpoint could be made, or the result is wrong: do not rely on these.",
            "",
            "| model type | class | what happened |",
            "|---|---|---|",
            *(
                f"| {o['model_type']} | {o['architecture']} | {clean(o['reason'])} |"
                for o in broken
            ),
            "",
        ]
    return "\n".join(lines)


def runs_row(outcome: dict[str, Any]) -> str:
    errors = " | ".join(f"{outcome['errors'][w]:.1e}" for w in ("prefill", "decode", "batch"))
    return f"| {outcome['model_type']} | {outcome['architecture']} | {errors} |"


def clean(text: str) -> str:
    return " ".join(text.replace("|", "/").replace("`", "'").split())[:220]


if __name__ == "__main__":
    raise SystemExit(main())
