"""The markdown tables of docs/benchmarks.md, from the JSON that these benchmarks store.

    python bench/engine/tables.py engine.json steal.json quality.json mixed.json

Reads the last line of each file and chooses the table by its `case`. Measures nothing and judges
nothing: what failed is listed below its table in its own words. Start at `tables`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# `memory-rss` is what is held, pages of files included; `load` counts from the engine's load call.
# The rest is in the JSON.
COLUMNS = (
    "decode-128", "decode-2048", "decode-8192", "prefill-128", "prefill-512", "batch-8", "batch-16",
    "batch-32", "load", "memory-rss",
)  # fmt: skip
LIMITS = {
    "read_gb_per_s": "GB/s read", "int8_tops": "int8 TOPS", "fp32_tflops": "fp32 TFLOPS",
}  # fmt: skip


def tables(document: dict[str, Any]) -> str:
    """Return the markdown of one document. Raises: KeyError for a case that has no table."""
    made = {
        "engine": engine, "engine_steal": steal, "engine_quality": quality,
        "engine_mixed_load": mixed_load,
    }  # fmt: skip
    return made[document["case"]](document)


def engine(document: dict[str, Any]) -> str:
    """Return for each model its limits and a table: contenders down, columns across."""
    return "\n\n".join(_model(result) for result in document["models"])


def _model(result: dict[str, Any]) -> str:
    metrics, parts = result["metrics"], result["limit_fraction"]
    columns = [column for column in COLUMNS if column in metrics]
    names = [name for name in result["accuracy"] if any(name in metrics[c] for c in columns)]
    rows = [[name, *(_cell(name, c, metrics, parts) for c in columns), _error(result, name)]
            for name in names]  # fmt: skip
    for label, key in (
        ("best peer", "ratios"),
        ("best with no smaller error", "ratios_at_equal_error"),
    ):
        for name in filter(_is_ours, names):
            ratios = [result.get(key, {}).get(column, {}).get(name) for column in columns]
            if any(ratio is not None for ratio in ratios):
                cells = ("" if ratio is None else f"**{ratio:.2f}**" for ratio in ratios)
                rows.append([f"**{name} / {label}**", *cells, ""])
    middle = result["limits"]["median"].items()
    limits = ", ".join(f"{value:.3g} {LIMITS[name]}" for name, value in middle)
    errors = result.get("rounding_error", {}).items()
    rounding = ", ".join(f"{error:.3f} in {bits}" for bits, error in errors)
    head = f"{result['model']}: {limits}" + (
        f"; rounding alone errs {rounding}" if rounding else ""
    )
    return f"{head}\n\n{_grid(['', *columns, 'logit error'], rows)}" + _listed(result["notes"])


def _cell(name: str, column: str, metrics: dict[str, Any], parts: dict[str, Any]) -> str:
    found = metrics[column].get(name)
    if found is None:
        return ""
    part = parts.get(column, {}).get(name) if _is_ours(name) else None
    return _number(found["p50"]) + ("" if part is None else f" ({part:.0%})")


def _error(result: dict[str, Any], name: str) -> str:
    """The error of the logits; where there are none, how far its token is from the best one."""
    found = result["accuracy"][name]
    if found["rms_error"] is not None:
        return f"{found['rms_error']:.3f}"
    return "token best" if found["gap"] == 0 else f"token {found['gap']:.3f} off"


def steal(document: dict[str, Any]) -> str:
    """Return what a busy process leaves of decoding."""
    header = ["", "alone tok/s", "beside a thief", "left", "fair", "of the fair share"]
    rows = [
        [
            row["contender"], _number(row["tok_per_s"]), _number(row["disturbed_tok_per_s"]),
            f"{row['left']:.0%}", f"{row['share_allows']:.0%}", f"**{row['of_share']:.0%}**",
        ]
        for row in document["rows"]
    ]  # fmt: skip
    return _grid(header, rows) + _listed(document["notes"])


def quality(document: dict[str, Any]) -> str:
    """Return perplexity and distance from float32 by format."""
    names = {
        "perplexity": ".2f", "rms_error": ".4f", "mean_kl": ".5f", "same_top1": ".1%",
    }  # fmt: skip
    header = ["", "perplexity", "logit error", "mean KL", "same best token"]
    rows = [
        [row["contender"], *(format(row[n], f) if n in row else "" for n, f in names.items())]
        for row in document["rows"]
        if "error" not in row
    ]
    failed = {row["contender"]: row["error"] for row in document["rows"] if "error" in row}
    return _grid(header, rows) + _listed(failed)


def mixed_load(document: dict[str, Any]) -> str:
    """Return each server's capacity, its p95 at 70 % of it, and its goodput at the same p95."""
    found = document.get("goodput", {})
    limit = document["p95_limit_s"]
    header = [
        "", "capacity /s", "p95 at 70 % s",
        "goodput /s" if limit is None else f"goodput /s at p95 ≤ {limit:.2f} s", "output tok/s",
        "goodput / best peer",
    ]  # fmt: skip
    rows = []
    for name, first in ((name, rows[0]) for name, rows in document["rows"].items() if rows):
        row, ratio = found.get(name), document.get("ratios", {}).get(name)
        rows.append([
            name, _number(document["capacity"][name]["capacity_per_s"]),
            _number(first["latency_p95_s"]), "none" if row is None else _number(row["rate_per_s"]),
            "" if row is None else _number(row["output_tok_per_s"]),
            "" if ratio is None else f"**{ratio:.2f}**",
        ])  # fmt: skip
    return _grid(header, rows) + _listed(document["notes"])


def _is_ours(name: str) -> bool:
    return name.startswith("mxn:")


def _number(value: float) -> str:
    """Return about three digits, without exponents."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _listed(notes: dict[str, str]) -> str:
    """Return one line for each thing that failed, or nothing."""
    lines = (f"\n- {name}: {why.splitlines()[0]}" for name, why in notes.items())
    text = "".join(lines)
    return f"\n{text}" if text else ""


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    for name in sys.argv[1:]:
        lines = Path(name).read_text().strip().splitlines()
        print(tables(json.loads(lines[-1])), end="\n\n")


if __name__ == "__main__":
    main()
