"""Score the predictor on public training runs: every row, MAPE, median, worst, Spearman, regret.

    python bench/train/predict.py [--json] [--rows] [--out bench/results/train-predict.json]

Sets: Sailor's measured plans (8 homogeneous rows, 4 mixed; 10 more cannot be scored and are shown
apart), vTrain's 1,440 runs (fitted on half, scored on the other half), published homogeneous runs.
Reads `tests/data/training` and the stored fits; fits nothing but the left-one-out rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fit import FIT_BLOCKS, sailor_rate
from sets import (
    SAILOR_TUNING,
    profile_seconds,
    roofline_seconds,
    sailor_cases,
    sailor_seconds,
    sailor_simulated_seconds,
    vtrain_cases,
)

from mxn.chips import specs
from mxn.errors import UserError
from mxn.train.plan import fits
from mxn.train.plan.analytic import derive_profile, numbers_of
from mxn.train.plan.predict import predict
from mxn.train.plan.scores import regret, scores
from mxn.train.plan.sets import vtrain
from mxn.train.plan.sets.published import CASES, Published
from mxn.train.plan.sets.sailor import SAILOR_MEMORY, SailorCase

Row = dict[str, Any]
VTRAIN_COLUMNS = "hidden blocks tp dp pp micro_batch micro_batches measured_s profiles_s roofline_s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the result as JSON only")
    parser.add_argument("--rows", action="store_true", help="print all 1,440 rows of vTrain too")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    result = {
        "schema": "mxn.train-predict/1",
        "sailor": sailor_part(),
        "vtrain": vtrain_part(),
        "published": published_part(),
    }
    text = json.dumps(result, indent=1, sort_keys=True)
    if options.out:
        options.out.write_text(text + "\n")
    if options.json:
        print(text)
    else:
        show(result, options.rows)


def sailor_part() -> Row:
    rate = fits.load("sailor")["constants"]["flow_bytes_per_s"]
    tuning = replace(SAILOR_TUNING, flow_bytes_per_s=rate)
    valid = [case for case in sailor_cases() if not case.fault]
    rows = [_sailor_row(case, sailor_seconds(case, tuning)) for case in valid]
    homogeneous = [case for case in valid if not case.is_mixed]
    left_out: list[Row] = []
    for case in homogeneous:
        others = [other for other in homogeneous if other is not case]
        without, _ = sailor_rate(others)
        seconds = sailor_seconds(case, replace(SAILOR_TUNING, flow_bytes_per_s=without))
        left_out.append(_sailor_row(case, seconds))
    mixed = [row for row in rows if row["mixed"]]
    events = [_sailor_row(case, sailor_simulated_seconds(case, tuning)) for case in valid]
    plain = [_sailor_row(case, sailor_seconds(case, SAILOR_TUNING)) for case in valid]
    apart = [case for case in sailor_cases() if case.fault]
    return {
        "basis": "measured",
        "flow_bytes_per_s": rate,
        "rows": rows,
        "rows_not_scored": [_sailor_row(c, sailor_seconds(c, tuning)) for c in apart],
        "all": _scores(rows),
        "mixed (no mixed row was fitted on)": _scores(mixed),
        "homogeneous": _scores([row for row in rows if not row["mixed"]]),
        "homogeneous left out in turn, and mixed": _scores(left_out + mixed),
        "event simulator": _scores(events),
        "event simulator, mixed": _scores([row for row in events if row["mixed"]]),
        "nothing fitted": _scores(plain),
        "derived GPT-Neo profiles": _scores(
            [_sailor_row(c, sailor_seconds(c, tuning)) for c in apart if "26 layers" not in c.fault]
        ),
        "choices": _sailor_choices(valid, [sailor_seconds(case, tuning) for case in valid]),
        "memory": _memory_scores(valid),
    }


def _sailor_choices(rows: Sequence[SailorCase], predicted: Sequence[float]) -> Row:
    """Return the regret of choosing among plans for the same nodes, model and batch."""
    groups: dict[tuple[str, str, int], list[int]] = {}
    for at, case in enumerate(rows):
        batch = case.plan.micro_batches * case.plan.micro_batch
        groups.setdefault((case.name.rpartition("/")[0], case.shape.name, batch), []).append(at)
    return _regrets(groups.values(), predicted, [case.measured_s for case in rows])


def _regrets(
    groups: Iterable[Sequence[int]], predicted: Sequence[float], measured: Sequence[float]
) -> Row:
    found = [
        regret([predicted[at] for at in group], [measured[at] for at in group])
        for group in groups
        if len(group) > 1
    ]
    return {"choices": len(found), "mean_regret": sum(found) / len(found), "worst": max(found)}


def _sailor_row(case: SailorCase, seconds: float) -> Row:
    return {
        "name": case.name,
        "mixed": case.is_mixed,
        "measured_s": case.measured_s,
        "predicted_s": seconds,
        "error": seconds / case.measured_s - 1,
        "note": case.fault,
    }


def _memory_scores(rows: Sequence[SailorCase]) -> Row:
    """Return errors of the fullest device's bytes, homogeneous and mixed apart."""
    found: Row = {}
    for name, mixed in (("GH200", False), ("mixed", True)):
        cases = [case for case in rows if case.is_mixed == mixed]
        predicted = [
            max(
                stage.memory_bytes
                for stage in predict(
                    c.plan, c.shape, c.cluster, c.profiles, memory=SAILOR_MEMORY
                ).stages
            )
            for c in cases
        ]
        found[name] = scores(predicted, [case.measured_bytes for case in cases])
    return found


def vtrain_part() -> Row:
    rows = vtrain_cases("none")
    profiles = fits.load("vtrain-profiles")["profiles"]
    by_profile = profile_seconds(rows, profiles)
    by_roofline = roofline_seconds(rows, fits.roofline())
    measured = [case.measured_s for case in rows]
    test = [at for at, case in enumerate(rows) if case.num_blocks not in FIT_BLOCKS]
    result: Row = {
        "is_composed": vtrain.is_composed(rows),
        "split": f"fitted on {FIT_BLOCKS} blocks, tested on 20 and 24",
        "columns": VTRAIN_COLUMNS,
        "rows": [
            f"{case.hidden} {case.num_blocks} {case.tp} {case.dp} {case.pp} "
            f"{case.plan.micro_batch} {case.plan.pipelines[0].micro_batches} "
            f"{case.measured_s:.5f} {a:.5f} {b:.5f}"
            for case, a, b in zip(rows, by_profile, by_roofline, strict=True)
        ],
    }
    for name, predicted in (
        ("profiles", by_profile),
        ("roofline", by_roofline),
    ):
        chosen = [predicted[at] for at in test], [measured[at] for at in test]
        result[f"{name}, test half"] = scores(*chosen)
        result[f"{name}, all"] = scores(predicted, measured)
    result["roofline, choice of parallelism"] = _choices(rows, by_roofline)
    result["profiles, choice of parallelism"] = _choices(rows, by_profile)
    return result


def _choices(rows: Sequence[vtrain.VtrainCase], predicted: Sequence[float]) -> Row:
    """Return the regret of choosing tp, dp, pp and micro-batch for a model, batch and devices."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for at, case in enumerate(rows):
        batch = case.plan.micro_batches * case.plan.micro_batch
        key = (case.hidden, case.num_blocks, case.tp * case.dp * case.pp, batch)
        groups.setdefault(key, []).append(at)
    return _regrets(groups.values(), predicted, [case.measured_s for case in rows])


def published_part() -> Row:
    rows: list[Row] = []
    for case in CASES:
        try:
            seconds = _published_s(case)
        except UserError as error:
            note = str(error).partition("\n")[0]
            rows.append({"name": case.name, "measured_s": case.measured_s, "note": note})
            continue
        rows.append(
            {
                "name": case.name,
                "measured_s": case.measured_s,
                "predicted_s": seconds,
                "error": seconds / case.measured_s - 1,
                "note": "",
            }
        )
    scored = [row for row in rows if "error" in row]
    return {"basis": "derived", "rows": rows, "all": _scores(scored)}


def _published_s(case: Published) -> float:
    chip = numbers_of(specs.load(case.chip))
    assert chip.tensor_link is not None
    tps = {stage.tp for pipeline in case.plan.pipelines for stage in pipeline.stages}
    profile = derive_profile(
        chip, case.shape, [case.plan.micro_batch], tps, roofline=fits.roofline()
    )
    cluster = case.cluster(chip.memory_bytes, chip.peak_flop_per_s, chip.tensor_link)
    return predict(case.plan, case.shape, cluster, {case.chip: profile}).iteration_s


def _scores(rows: Sequence[Row]) -> Row:
    predicted = [row["predicted_s"] for row in rows]
    measured = [row["measured_s"] for row in rows]
    return scores(predicted, measured)


def show(result: Row, all_rows: bool) -> None:
    sailor, runs, published = result["sailor"], result["vtrain"], result["published"]
    print("Sailor, measured plans")
    _show_fit("one constant", "sailor")
    _show_rows(sailor["rows"])
    _show_scores(sailor)
    _show_choices("plans for the same nodes", sailor["choices"])
    print("\nnot scored")
    _show_rows(sailor["rows_not_scored"])
    for name, found in sailor["memory"].items():
        print(f"  memory, {name}: MAPE {found['mape']:.1%}, worst {found['worst']:.1%}")
    print(f"\nvTrain, 1,440 runs; {runs['split']}")
    _show_fit("profiles", "vtrain-profiles")
    _show_fit("roofline", "roofline")
    if runs["is_composed"]:
        print("  times are exactly linear in micro-batches: composed, not measured one by one")
    _show_scores(runs)
    for name in ("profiles", "roofline"):
        _show_choices(f"{name}, parallelism", runs[f"{name}, choice of parallelism"])
    if all_rows:
        print("  " + runs["columns"])
        for row in runs["rows"]:
            print("  " + row)
    print("\npublished homogeneous runs, profiles derived from data sheets")
    _show_rows(published["rows"])
    _show_scores(published)


def _show_fit(title: str, name: str) -> None:
    fit = fits.load(name)
    fitted_on = fit["fitted_on"]
    if isinstance(fitted_on, list):
        fitted_on = f"{len(fitted_on)} rows: {', '.join(map(str, fitted_on))}"
    values = fit.get("constants")
    if values is None:
        values = f"{len(fit['profiles'])} of {len(fit['values_s'])} times each"
    print(f"  {title}: {values}; fitted on {fitted_on}; tested on {fit['tested_on']}")


def _show_rows(rows: Sequence[Row]) -> None:
    print(f"  {'':36s} {'measured':>10s} {'predicted':>10s} {'error':>8s}")
    for row in rows:
        if "error" not in row:
            print(f"  {row['name']:36s} {row['measured_s']:9.3f}s   {row['note']}")
            continue
        print(
            f"  {row['name']:36s} {row['measured_s']:9.3f}s {row['predicted_s']:9.3f}s "
            f"{row['error']:+8.1%}  {row['note']}"
        )


def _show_choices(name: str, found: Row) -> None:
    print(
        f"  {name}: {found['choices']} choices, mean regret of the best predicted "
        f"{found['mean_regret']:.2%}, worst {found['worst']:.1%}"
    )


def _show_scores(part: Row) -> None:
    for name, found in part.items():
        if isinstance(found, dict) and "mape" in found:
            print(
                f"  {name}: {found['rows']:.0f} rows, MAPE {found['mape']:.1%}, median "
                f"{found['median']:.1%}, worst {found['worst']:.1%}, Spearman "
                f"{found['spearman']:.3f}"
            )


if __name__ == "__main__":
    main()
