"""The figures of `mixed.py`: what a mix reached of what its ranks do alone. Start at `summary`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mixed_jobs import Mix
from paused import Window

T = TypeVar("T")
RATIOS = ("R", "R_strict", "R_beside")


@dataclass(frozen=True, slots=True)
class Alone:
    """One rank with the whole model: seconds of a step of all rows of the mix."""

    step_s: float
    computing_s: float  # of it, without what is done once a step

    @classmethod
    def of(cls, window: Window, mix: Mix) -> Alone:
        # Both times of a row are of the same step, so a stop in it would not be in the difference;
        # the first row is left out all the same.
        once_s = statistics.median(row["seconds"] - row["rank0_busy_s"] for row in window.rows[1:])
        busy_s = (window.step_s - once_s) * mix.rows / mix.solo_rows
        return cls(busy_s + once_s, busy_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A plan in one cycle. `reached`: of what its ranks computed at in the same steps."""

    step_s: float
    reached: float
    plan: str
    predicted_s: float | None  # None: nothing was profiled in this cycle

    @classmethod
    def of(cls, window: Window, work: Sequence[float], plan: str, predicted_s: float | None) -> Run:
        def reached(row: dict[str, Any]) -> float:
            speeds = (part / row[f"rank{rank}_busy_s"] for rank, part in enumerate(work))
            return 1 / (row["seconds"] * sum(speeds))

        each = statistics.median(map(reached, window.rows[1:]))
        return cls(step_s=window.step_s, reached=each, plan=plan, predicted_s=predicted_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycle:
    """What was measured close together: ranks alone and at the same time by rank, plans by name."""

    alone: list[Alone]
    beside: list[Alone]
    runs: dict[str, Run]

    def text(self, mix: Mix) -> str:
        bounds = _bounds(mix, [self])
        parts = [f"U {bounds['R']:.0f} (beside {bounds['R_beside']:.0f})"]
        for name, run in self.runs.items():
            rate = mix.tokens / run.step_s
            told = f", predicted {run.predicted_s:.2f}" if run.predicted_s else ""
            parts.append(
                f"{name} {run.step_s:.2f} s, R {rate / bounds['R']:.1%}, "
                f"beside {rate / bounds['R_beside']:.1%}, reached {run.reached:.1%}{told}, "
                f"{run.plan}"
            )
        return "; ".join(parts)


def _bounds(mix: Mix, cycles: Sequence[Cycle]) -> dict[str, float]:
    """Return the sums that throughput is divided by, in tokens/s, by the name of the ratio."""

    def rate(seconds: Callable[[Cycle, int], float]) -> float:
        ranks = range(len(mix.shares))
        return sum(mix.tokens / statistics.mean(seconds(c, rank) for c in cycles) for rank in ranks)

    return {
        "R": rate(lambda cycle, rank: cycle.alone[rank].step_s),
        "R_strict": rate(lambda cycle, rank: cycle.alone[rank].computing_s),
        "R_beside": rate(lambda cycle, rank: cycle.beside[rank].step_s),
    }


def _ratios(mix: Mix, name: str, cycles: Sequence[Cycle]) -> dict[str, float]:
    """Return what a plan reached in these cycles, all of which have it."""
    rate = mix.tokens / statistics.mean(cycle.runs[name].step_s for cycle in cycles)
    bounds = _bounds(mix, cycles)
    return {ratio: rate / bounds[ratio] for ratio in RATIOS}


def summary(mix: Mix, cycles: list[Cycle]) -> dict[str, Any]:
    """Return the figures of a mix: by the mean times of the cycles that have a plan.

    `R_error` is the standard error of R, by leaving out each cycle in turn.
    """
    runs: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for cycle in cycles for name in cycle.runs):
        own = [cycle for cycle in cycles if name in cycle.runs]
        runs[name] = _row(mix, name, own) | {
            "R_error": _error(lambda some, name=name: _ratios(mix, name, some)["R"], own)
        }
    bounds = _bounds(mix, cycles)
    solos = [
        round(mix.tokens / statistics.mean(cycle.alone[rank].step_s for cycle in cycles), 1)
        for rank in range(len(mix.shares))
    ]
    return {
        "shares": list(mix.shares), "solo_tokens_per_s": solos, "U": round(bounds["R"], 1),
        "U_strict": round(bounds["R_strict"], 1), "U_beside": round(bounds["R_beside"], 1),
        "cycles": len(cycles), "runs": runs,
    }  # fmt: skip


def _row(mix: Mix, name: str, cycles: list[Cycle]) -> dict[str, Any]:
    own = [cycle.runs[name] for cycle in cycles]
    step_s = statistics.mean(run.step_s for run in own)
    pairs = [(run.step_s, run.predicted_s) for run in own if run.predicted_s is not None]
    row: dict[str, Any] = {
        "tokens_per_s": round(mix.tokens / step_s, 1), "step_s": round(step_s, 4),
        "cycles": len(own), "plan": own[-1].plan,
        "reached": round(statistics.median(run.reached for run in own), 4),
        "R_each": [round(_ratios(mix, name, [cycle])["R"], 4) for cycle in cycles],
    }  # fmt: skip
    row |= {ratio: round(value, 4) for ratio, value in _ratios(mix, name, cycles).items()}
    if pairs:
        row["predicted_error"] = round(_off(pairs), 4)
        row["predicted_errors"] = [round(told / took - 1, 4) for took, told in pairs]
        row["predicted_error_se"] = _error(_off, pairs)
    return row


def _off(pairs: Sequence[tuple[float, float]]) -> float:
    """Return how much longer than it took a step was predicted to take, by means."""
    took_s, predicted_s = (sum(column) for column in zip(*pairs, strict=True))
    return predicted_s / took_s - 1


def _error(value: Callable[[list[T]], float], rows: list[T]) -> float | None:
    """Return the standard error of a value of means, by leaving out each row in turn."""
    count = len(rows)
    if count < 3:
        return None
    left = [value(rows[:number] + rows[number + 1 :]) for number in range(count)]
    middle = statistics.mean(left)
    return round(((count - 1) / count * sum((one - middle) ** 2 for one in left)) ** 0.5, 4)


def show(found: dict[str, Any]) -> None:
    mix = " : ".join(f"{share:g}" for share in found["shares"])
    print(
        f"\nmix {mix}, {found['cycles']} cycles: sum of solos {found['U']:.0f} tokens/s, "
        f"compute only {found['U_strict']:.0f}, "
        f"solos at the same time {found['U_beside']:.0f}"
    )
    print(
        f"{'':10}{'tokens/s':>10}{'R':>8}{'+-':>7}{'strict':>9}{'beside':>9}{'reached':>9}"
        f"{'predicted':>13}  plan"
    )
    for name, row in found["runs"].items():
        error = f"{row['R_error']:.1%}" if row["R_error"] is not None else ""
        told = f"{row['predicted_error']:+.1%}" if "predicted_error" in row else ""
        if row.get("predicted_error_se") is not None:
            told += f"+-{row['predicted_error_se']:.1%}"
        print(
            f"{name:10}{row['tokens_per_s']:10.0f}{row['R']:8.1%}{error:>7}{row['R_strict']:9.1%}"
            f"{row['R_beside']:9.1%}{row['reached']:9.1%}{told:>13}  {row['plan']}"
        )
