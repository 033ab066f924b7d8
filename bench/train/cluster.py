"""The planner on clusters that nobody here has: two chips on 768 devices, six on a thousand.

    python bench/train/cluster.py [--only cases|links|scale] [--out FILE]

For models of 70B and 140B: the plan, its predicted share of both bounds, the time of the search;
how the result depends on the link between makers; and where more devices stop helping, up to ten
thousand. Chips are derived from their data sheets, links are assumed: everything here is
`simulated`. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mxn.chips.specs import all_specs
from mxn.errors import CapacityError
from mxn.train.plan.analytic import derive_profile, numbers_of
from mxn.train.plan.bounds import Bounds, bounds
from mxn.train.plan.cluster import Cluster
from mxn.train.plan.clusters import read_cluster
from mxn.train.plan.explain import describe, explain
from mxn.train.plan.memory import MIXED
from mxn.train.plan.profile import ChipProfile
from mxn.train.plan.search.choices import Found, Limits
from mxn.train.plan.search.planner import search
from mxn.train.plan.shape import ModelShape
from mxn.train.plan.simulated import SIX_CHIPS, TWO_CHIPS, cluster_text
from mxn.train.shapes import read_shape

SEQ_TOKENS = 4096
ROWS = 1024  # of a step: four million tokens, as Llama 2 was trained with
MICRO_BATCHES = (1, 2, 4)
WIDTHS = (1, 2, 4, 8)
LINKS = (0.1, 0.3, 1, 3, 10, 25, 100)  # GB/s between makers
SCALES = (0.25, 0.5, 1, 2, 4, 10)  # of the thousand devices
CLUSTERS = {"two chips, 768": TWO_CHIPS, "six chips, 1000": SIX_CHIPS}
# The first are Llama 2 70B's dimensions. There is no public Llama of 140B: the second has its
# proportions, wider and deeper.
MODELS = {
    "llama-70b": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
                  "intermediate_size": 28672},
    "llama-140b": {"hidden_size": 10240, "num_hidden_layers": 104, "num_attention_heads": 80,
                   "intermediate_size": 35840},
}  # fmt: skip


def shape_of(model: str) -> ModelShape:
    """Return a model's shape, read from a config.json as any model's is."""
    config = MODELS[model] | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000,
        "num_key_value_heads": 8, "max_position_embeddings": SEQ_TOKENS, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / model
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        return read_shape(path, seq_tokens=SEQ_TOKENS, dtype="bfloat16")


def pool_of(
    groups: tuple[tuple[str, str, int], ...], **options: float
) -> tuple[Cluster, list[str]]:
    found = read_cluster(cluster_text(groups, **options), "simulated cluster", all_specs())
    return found.cluster, list(found.notes)


def profiles_of(cluster: Cluster, shape: ModelShape) -> dict[str, ChipProfile]:
    return {
        group.chip: derive_profile(
            numbers_of(all_specs()[group.chip], tensor_link=group.node_link),
            shape, MICRO_BATCHES, WIDTHS,
        )
        for group in cluster.groups
    }  # fmt: skip


def timed_search(
    shape: ModelShape, rows: int, cluster: Cluster, profiles: dict[str, ChipProfile]
) -> tuple[Found, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = search(shape, rows, cluster, profiles, memory=MIXED, limits=Limits())
    return found, {
        "search_wall_s": round(time.perf_counter() - wall, 2),
        "search_cpu_s": round(time.process_time() - cpu, 2),
    }


def outcome(found: Found, bound: Bounds) -> dict[str, Any]:
    seen = found.best.prediction
    ratio, strict = bound.ratios(seen.tokens_per_s)
    plan = found.best.plan
    return {
        "plan": describe(plan), "origin": found.best.origin, "schedule": plan.schedule,
        "iteration_s": round(seen.iteration_s, 3), "tokens_per_s": round(seen.tokens_per_s),
        "pipelines": len(plan.pipelines), "devices_used": plan.num_devices,
        "micro_batches": plan.micro_batches, "stages": max(len(p.stages) for p in plan.pipelines),
        "bubble": round(seen.bubble, 4), "reduce_s": round(seen.reduce_s, 3),
        "mfu": seen.mfu and round(seen.mfu, 4), "R": ratio and round(ratio, 4),
        "R_strict": round(strict, 4), "plans_looked_at": found.num_looked_at,
        "basis": "simulated",
    }  # fmt: skip


def cases() -> Iterator[dict[str, Any]]:
    """Yield each model on each cluster."""
    for pool, groups in CLUSTERS.items():
        cluster, notes = pool_of(groups)
        for model in MODELS:
            shape = shape_of(model)
            profiles = profiles_of(cluster, shape)
            found, times = timed_search(shape, ROWS, cluster, profiles)
            began = time.process_time()
            bound = bounds(shape, ROWS, cluster, profiles, memory=MIXED)
            times["bounds_cpu_s"] = round(time.process_time() - began, 2)
            shared = bounds(shape, ROWS, cluster, profiles, memory=MIXED, share_batch=True)
            ratio, _ = shared.ratios(found.best.prediction.tokens_per_s)
            told = explain(found, shape, cluster, profiles, bound, memory=MIXED)
            yield {
                "cluster": pool, "model": model, "params": shape.params, "rows": ROWS,
                **outcome(found, bound), **times, "R_shared_batch": ratio and round(ratio, 4),
                "shares": {name: round(value, 4) for name, value in told.shares.items()},
                "explanation": list(told.lines()), "notes": notes,
            }  # fmt: skip


def links() -> Iterator[dict[str, Any]]:
    """Yield the 70B model with links between makers of different speed."""
    shape = shape_of("llama-70b")
    for pool, groups in CLUSTERS.items():
        bound = None
        for rate in LINKS:
            cluster, _ = pool_of(groups, between_gb_per_s=rate)
            profiles = profiles_of(cluster, shape)
            bound = bound or bounds(
                shape, ROWS, cluster, profiles, memory=MIXED
            )  # no group has such a link
            found, times = timed_search(shape, ROWS, cluster, profiles)
            yield {"cluster": pool, "between_gb_per_s": rate, **outcome(found, bound), **times}


def scale() -> Iterator[dict[str, Any]]:
    """Yield the 70B model on more and more devices, for a fixed batch and for one four times."""
    shape = shape_of("llama-70b")
    for rows in (ROWS, 4 * ROWS):
        for factor in SCALES:
            cluster, _ = pool_of(SIX_CHIPS, scale=factor)
            profiles = profiles_of(cluster, shape)
            bound = bounds(shape, rows, cluster, profiles, memory=MIXED)
            try:
                found, times = timed_search(shape, rows, cluster, profiles)
            except CapacityError as error:
                yield {"devices": cluster.num_devices, "rows": rows, "error": str(error)}
                continue
            yield {"devices": cluster.num_devices, "rows": rows, **outcome(found, bound), **times}


PARTS = {"cases": cases, "links": links, "scale": scale}
COLUMNS = {
    "cases": ("cluster", "model", "iteration_s", "tokens_per_s", "R", "R_shared_batch", "R_strict",
              "stages", "pipelines", "schedule", "search_wall_s", "search_cpu_s"),
    "links": ("cluster", "between_gb_per_s", "tokens_per_s", "R", "R_strict", "origin", "reduce_s"),
    "scale": ("devices", "rows", "tokens_per_s", "R", "R_strict", "stages", "pipelines",
              "search_wall_s", "search_cpu_s"),
}  # fmt: skip


def table(part: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    names = COLUMNS[part]
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for row in rows:
        yield "| " + " | ".join(str(row.get(name, "-")) for name in names) + " |"


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--out", type=Path, default=Path("bench/results/train-cluster.json"))
    options = parser.parse_args()
    kept = json.loads(options.out.read_text())["metrics"] if options.out.exists() else {}
    for part in options.only or PARTS:
        rows: list[dict[str, Any]] = []
        for row in PARTS[part]():
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k in COLUMNS[part]}), flush=True)
        kept[part] = rows
        print("\n".join(table(part, rows)), flush=True)
    document = {
        "schema": 1, "case": "train-cluster", "git": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "os": platform.system()},
        "params": {"seq_tokens": SEQ_TOKENS, "rows": ROWS, "micro_batches": MICRO_BATCHES,
                   "widths": WIDTHS, "models": MODELS},
        "metrics": kept, "basis": "simulated",
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
