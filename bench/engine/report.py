"""From measured values to quantiles, ratios, a table and the document of the last line.

Knows no engines and no processes. Start at `document` and `show`.
"""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cost

if TYPE_CHECKING:
    from run import Session

UNITS = {"load": "s", "load-spawn": "s", "memory": "MiB", "memory-rss": "MiB"}


def quantiles(values: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Return p20, p50, p80 and the unit of each contender in each column."""
    return {
        column: {
            name: {
                "p20": _quantile(found, 0.2), "p50": _quantile(found, 0.5),
                "p80": _quantile(found, 0.8), "unit": UNITS.get(column, "tok/s"),
            }
            for name, found in cells.items()
        }
        for column, cells in values.items()
    }  # fmt: skip


def _quantile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return round(ordered[low] + (place - low) * (ordered[high] - ordered[low]), 3)


def fractions(
    session: Session, shape: cost.Shape, middle: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Return each contender's part of the limit: bandwidth in decode, int8 peak in prefill."""
    result: dict[str, dict[str, float]] = {}
    for column in session.columns:
        for contender in session.running:
            found = session.values[column.name].get(contender.name)
            if not found:
                continue
            rate = _quantile(found, 0.5)
            if column.steps:
                stored = cost.weight_bytes(session.built[contender], contender.weights, shape)
                step = cost.bytes_per_step(
                    shape, stored, contender.kv_bytes, column.context, column.batch
                )
                part = rate / column.batch * step / 1e9 / middle["read_gb_per_s"]
            elif "int8_tops" in middle:
                flop = cost.prefill_flop(shape, column.context)
                part = rate / column.context * flop / 1e12 / middle["int8_tops"]
            else:
                continue
            result.setdefault(column.name, {})[contender.name] = round(part, 3)
    return result


SLACK = 0.97  # errors of one format differ by a few percent from prompt to prompt


def ratios(
    cells: dict[str, dict[str, Any]], is_cost: bool, errors: dict[str, float] | None = None
) -> dict[str, float]:
    """Return each of our formats divided by the best peer; above 1 is better in every column.

    With `errors` of the logits only peers count whose error is no smaller than ours.
    """
    found = {}
    for name, cell in cells.items():
        if not name.startswith("mxn:"):
            continue
        others = [
            other["p50"]
            for peer, other in cells.items()
            if not peer.startswith("mxn:") and (errors is None or _is_no_better(errors, peer, name))
        ]
        if others:
            best, value = (min(others) if is_cost else max(others)), cell["p50"]
            found[name] = round(best / value if is_cost else value / best, 3)
    return found


def _is_no_better(errors: dict[str, float], peer: str, ours: str) -> bool:
    return peer not in errors or ours not in errors or errors[peer] >= SLACK * errors[ours]


def errors_of(result: dict[str, Any]) -> dict[str, float]:
    """Return the logit error of each contender that gives logits."""
    found = {name: each.get("rms_error") for name, each in result["accuracy"].items()}
    return {name: error for name, error in found.items() if error is not None}


def show(result: dict[str, Any]) -> None:
    """Print one model's table: contenders down, columns across."""
    metrics, parts = result["metrics"], result["limit_fraction"]
    names = list(dict.fromkeys(name for cells in metrics.values() for name in cells))
    columns = list(metrics)
    print(f"\n{result['model']}: tok/s (part of the limit), load in s, memory in MiB; medians")
    limits = ", ".join(f"{name} {value:.3g}" for name, value in result["limits"]["median"].items())
    print(f"limits: {limits}")
    rows = [["", *columns, "logit error"]]
    for name in names:
        row = [name]
        for column in columns:
            cell = metrics[column].get(name)
            part = parts.get(column, {}).get(name)
            text = "-" if cell is None else f"{cell['p50']:.4g}"
            row.append(text + (f" ({part:.0%})" if part is not None else ""))
        error = result["accuracy"].get(name, {}).get("rms_error")
        rows.append([*row, "-" if error is None else f"{error:.4f}"])
    for name in [name for name in names if name.startswith("mxn:")]:
        row = [f"{name} / best peer"]
        for column in columns:
            found = ratios(metrics[column], column in UNITS).get(name)
            row.append("-" if found is None else f"{found:.2f}x")
        rows.append([*row, ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    for name, why in result["notes"].items():
        print(f"{name}: no: {why.splitlines()[0]}")


def document(results: list[dict[str, Any]], params: dict[str, Any]) -> dict[str, Any]:
    """Return the last line of stdout."""
    for result in results:
        result["ratios"] = {
            column: ratios(cells, column in UNITS) for column, cells in result["metrics"].items()
        }
        result["ratios_at_equal_error"] = {
            column: ratios(cells, column in UNITS, errors_of(result))
            for column, cells in result["metrics"].items()
        }
    return {
        "schema": 1, "case": "engine", "basis": "measured", **_git(), "machine": _machine(),
        "versions": _versions(), "params": params, "models": results,
    }  # fmt: skip


def _git() -> dict[str, Any]:
    def ask(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
        return done.stdout.strip()

    return {"git": ask("rev-parse", "HEAD") or None, "dirty": bool(ask("status", "--porcelain"))}


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    pairs = (line.partition(":") for line in lines)
    named = {name.strip(): value.strip() for name, _, value in pairs}
    flags = named.get("flags", "").split()
    isa = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if flag in flags]
    return {"cpu": named.get("model name"), "isa": isa, "os": platform.platform()}


def _versions() -> dict[str, str]:
    found = {}
    for name in ("mxn", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
