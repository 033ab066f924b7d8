"""The figures of `mixed.py`: what a mix reached of what its ranks do alone. Start at `summary`."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixed import Mix


def summary(mix: Mix) -> dict[str, Any]:
    """Return the figures of a mix: tokens/s are medians over all counted steps."""
    rate = {name: mix.tokens / statistics.median(steps) for name, steps in mix.seconds.items()}
    solo = {share: rate[f"solo-{share:g}"] for share in set(mix.shares)}
    pure = {
        share: mix.tokens / statistics.median(mix.busy[f"solo-{share:g}"])
        for share in set(mix.shares)
    }
    bound = sum(solo[share] for share in mix.shares)
    strict = sum(pure[share] for share in mix.shares)
    beside = sum(mix.tokens / statistics.median(steps) for steps in mix.beside.values())
    runs = {}
    for name, steps in mix.seconds.items():
        step, predicted = statistics.median(steps), statistics.median(mix.predicted[name])
        runs[name] = {
            "tokens_per_s": round(rate[name], 1), "step_s": round(step, 4),
            "p20_s": round(statistics.quantiles(steps, n=5)[0], 4),
            "p80_s": round(statistics.quantiles(steps, n=5)[-1], 4),
            "predicted_s": round(predicted, 4), "error": round(predicted / step - 1, 4),
            "plan": mix.plans[name], "steps": len(steps),
        }  # fmt: skip
        if not name.startswith("solo"):
            runs[name] |= {
                "R": round(rate[name] / bound, 4),
                "R_strict": round(rate[name] / strict, 4),
                "R_beside": round(rate[name] / beside, 4),
            }
    return {
        "shares": list(mix.shares), "U": round(bound, 1), "U_strict": round(strict, 1),
        "U_beside": round(beside, 1), "runs": runs,
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    mix = " : ".join(f"{share:g}" for share in found["shares"])
    print(
        f"\nmix {mix}: sum of solos {found['U']:.0f} tokens/s, "
        f"compute only {found['U_strict']:.0f}, "
        f"solos at the same time {found['U_beside']:.0f}"
    )
    head = f"{'tokens/s':>10}{'R':>8}{'R strict':>10}{'R beside':>10}{'predicted':>11}"
    print(f"{'':14}{head}  plan")
    for name, row in found["runs"].items():
        ratios = " " * 28
        if "R" in row:
            ratios = f"{row['R']:8.1%}{row['R_strict']:10.1%}{row['R_beside']:10.1%}"
        print(f"{name:14}{row['tokens_per_s']:10.0f}{ratios}{row['error']:+11.1%}  {row['plan']}")
