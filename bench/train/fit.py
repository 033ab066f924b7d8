"""Fit what profiles and data sheets leave out, on one part of a public set; store it with the part.

    python bench/train/fit.py [sailor] [roofline] [vtrain-profiles]

Writes src/mxn/train/plan/fits/*.json; `analytic.Roofline` repeats the constants of one, by hand.
`bench/train/predict.py` scores the other part. Takes a minute or two; no network, no randomness.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sets import (
    SAILOR_TUNING,
    roofline_seconds,
    sailor_cases,
    sailor_seconds,
    vtrain_cases,
    vtrain_links,
)

from mxn.train.plan.analytic import Roofline
from mxn.train.plan.scores import scores
from mxn.train.plan.sets import sailor, vtrain

FITS = Path(__file__).parents[2] / "src/mxn/train/plan/fits"
ROOFLINE_NAMES = (
    "top_share",
    "passes",
    "odd_share",
    "block_launch_s",
    "tensor_launch_s",
    "border_launch_s",
    "update_bytes",
)
STARTS = tuple(  # plain guesses; the best on the fit half is kept
    Roofline(
        top_share=share,
        passes=passes,
        odd_share=0.25,
        block_launch_s=1e-3,
        tensor_launch_s=1e-4,
        border_launch_s=3e-4,
        update_bytes=36.0,
    )
    for share, passes in ((0.6, 2.5), (0.7, 3.0), (0.8, 2.0))
)
FIT_BLOCKS = (12, 16)  # vTrain's fit half; 20 and 24 blocks are the test half


def main(names: Sequence[str]) -> None:
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        "sailor": fit_sailor,
        "roofline": fit_roofline,
        "vtrain-profiles": fit_profiles,
    }
    for name in names or jobs:
        found = jobs[name]()
        (FITS / f"{name}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(name, json.dumps(found)[:600])


def fit_sailor() -> dict[str, Any]:
    """Fit the one constant on the homogeneous rows; no mixed row is looked at."""
    rows = [case for case in sailor_cases() if not case.fault and not case.is_mixed]
    rate, loss = sailor_rate(rows)
    return {
        "by": "bench/train/fit.py sailor",
        "constants": {"flow_bytes_per_s": rate},
        "fitted_on": [case.name for case in rows],
        "tested_on": "the mixed rows (mit/…), and each homogeneous row left out in turn",
        "mean_abs_log_error": loss,
    }


def sailor_rate(rows: Sequence[sailor.SailorCase]) -> tuple[float, float]:
    """Return bytes/s of one flow with the least mean error on `rows`, and that error."""
    found: list[tuple[float, float]] = []
    for step in range(41):
        rate = float(f"{1e9 * 40 ** (step / 40):.3g}")  # 1 to 40 GB/s
        tuning = replace(SAILOR_TUNING, flow_bytes_per_s=rate)
        found.append((_loss([sailor_seconds(c, tuning) for c in rows], rows), rate))
    loss, rate = min(found)
    return rate, loss


def fit_roofline() -> dict[str, Any]:
    """Fit on half of vTrain's runs by depth; show what the harder halves by hidden size would give.

    The runs are taken without recomputation, whatever the set's description says: with it, the
    fit wants products at 100 % of the peak and makes published A100 runs 22 % too fast; without,
    it finds two thirds of the peak and comes within a few per cent of runs it has not seen.
    """
    rows = vtrain_cases("none")
    halves: dict[str, Callable[[vtrain.VtrainCase], bool]] = {
        f"blocks {FIT_BLOCKS}": lambda case: case.num_blocks in FIT_BLOCKS,
        "hidden 1024": lambda case: case.hidden == 1024,
        "hidden 2048": lambda case: case.hidden == 2048,
    }
    tests: dict[str, Any] = {}
    constants: list[dict[str, float]] = []
    for name, is_fitted in halves.items():
        best = search_roofline([case for case in rows if is_fitted(case)])
        other = [case for case in rows if not is_fitted(case)]
        tests[f"fitted on {name}"] = scores(
            roofline_seconds(other, best), [case.measured_s for case in other]
        )
        constants.append({key: float(f"{getattr(best, key):.4g}") for key in ROOFLINE_NAMES})
    return {
        "by": "bench/train/fit.py roofline",
        "constants": constants[0],
        "fitted_on": f"vTrain rows with {FIT_BLOCKS} blocks (720 of 1,440)",
        "tested_on": "vTrain rows with 20 and 24 blocks; published runs of other models",
        "tests_on_the_other_half": tests,
    }


def search_roofline(rows: Sequence[vtrain.VtrainCase]) -> Roofline:
    """Return the constants with the least mean absolute log error, on every third row."""
    few = rows[::3]
    return min((_descend(start, few) for start in STARTS), key=lambda found: found[1])[0]


def _descend(best: Roofline, rows: Sequence[vtrain.VtrainCase]) -> tuple[Roofline, float]:
    """Return the end of a search along one constant after the other, in halving steps."""
    loss = _loss(roofline_seconds(rows, best), rows)
    step = 0.25
    for _ in range(6):
        for name in ROOFLINE_NAMES:
            for factor in (1 + step, 1 / (1 + step)):
                while True:
                    tried = replace(best, **{name: getattr(best, name) * factor})
                    if tried.top_share > 1:
                        break
                    tried_loss = _loss(roofline_seconds(rows, tried), rows)
                    if tried_loss > loss - 1e-6:
                        break
                    best, loss = tried, tried_loss
        step /= 2
    return best, loss


def fit_profiles() -> dict[str, Any]:
    """Read the layer times out of half of the runs: least squares, one profile per size and width.

    The last stage is the slowest (it has the head), so a step is linear in the layer times:
    blocks + (m - 1)/S of them, heads m, embedding 1 (m in a single stage), update of blocks / S.
    """
    links = vtrain_links()
    groups: dict[tuple[int, int, int], list[vtrain.VtrainCase]] = {}
    for case in vtrain_cases("none"):
        if case.num_blocks in FIT_BLOCKS:
            groups.setdefault(case.key, []).append(case)
    profiles = {"-".join(map(str, key)): _solve(rows, links) for key, rows in groups.items()}
    return {
        "by": "bench/train/fit.py vtrain-profiles",
        "key": "hidden-tp-micro batch",
        "values_s": ["block", "head", "embedding", "block update", "update of the ends"],
        "profiles": profiles,
        "fitted_on": f"vTrain rows with {FIT_BLOCKS} blocks (720 of 1,440)",
        "tested_on": "vTrain rows with 20 and 24 blocks",
    }


def _solve(rows: Sequence[vtrain.VtrainCase], links: dict[int, Any]) -> list[float]:
    left: list[list[float]] = []
    right: list[float] = []
    for case in rows:
        count = case.plan.pipelines[0].micro_batches
        share = case.num_blocks / case.pp
        left.append(
            [
                case.num_blocks + (count - 1) * share,
                count,
                1 if case.pp > 1 else count,
                share,
                1,
            ]
        )
        right.append(case.measured_s - _sum_s(case, links))
    weights = 1 / np.array([case.measured_s for case in rows])
    found = _not_negative(np.array(left) * weights[:, None], np.array(right) * weights)
    return [float(f"{value:.5g}") for value in found]


def _not_negative(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return least squares without negative times: drop the most negative one, solve again."""
    kept = list(range(left.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(left[:, kept], right, rcond=None)
        if found.min() >= 0:
            whole = np.zeros(left.shape[1])
            whole[kept] = found
            return whole
        kept.pop(int(found.argmin()))


def _sum_s(case: vtrain.VtrainCase, links: dict[int, Any]) -> float:
    """Return the gradient sum of the stage with most parameters, as `predict` will time it."""
    if case.dp == 1:
        return 0.0
    shape = vtrain.shape(case.hidden, case.num_blocks)
    most = max(
        sum(shape.layers[i].params for c in stage.chunks for i in range(c.first, c.end))
        for stage in case.plan.pipelines[0].stages
    )
    link = links[case.dp]
    return 2 * (case.dp - 1) * link.transfer_s(2.0 * most / case.tp / case.dp)


def _loss(predicted: Sequence[float], rows: Sequence[Any]) -> float:
    pairs = zip(predicted, rows, strict=True)
    return sum(abs(math.log(p / row.measured_s)) for p, row in pairs) / len(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
