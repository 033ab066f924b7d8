"""The predictor on public measured runs: the goals of the project, and what the data really is."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mxn.errors import UserError
from mxn.train.plan import fits
from mxn.train.plan.scores import scores
from mxn.train.plan.sets import sailor as sailor_set
from mxn.train.plan.sets import vtrain
from mxn.train.plan.sets.published import CASES

BENCH = Path(__file__).resolve().parents[3] / "bench" / "train"
sys.path.insert(0, str(BENCH))

import predict as bench  # noqa: E402
import sets  # noqa: E402

sys.path.remove(str(BENCH))
for _file in BENCH.glob("*.py"):
    sys.modules.pop(_file.stem, None)  # names others may want


def tuning():
    constants = fits.load("sailor")["constants"]
    return replace(sets.SAILOR_TUNING, **constants)


def sailor_scores(rows):
    predicted = [sets.sailor_seconds(case, tuning()) for case in rows]
    return scores(predicted, [case.measured_s for case in rows])


def valid():
    return [case for case in sets.sailor_cases() if not case.fault]


def test_sailor_is_read_whole_and_its_faults_are_named():
    cases = sets.sailor_cases()
    assert len(cases) == 22
    assert len(valid()) == 12
    assert sum(case.is_mixed for case in cases) == 4
    for case in cases:
        case.plan.check()
        assert case.plan.num_layers == case.shape.num_layers


def test_sailor_measured_plans_are_within_eight_percent():
    found = sailor_scores(valid())
    assert found["mape"] <= 0.08
    assert found["spearman"] >= 0.98


def test_sailor_mixed_plans_are_within_ten_percent_though_none_was_fitted_on():
    assert not any("mit" in name for name in fits.load("sailor")["fitted_on"])
    assert sailor_scores([case for case in valid() if case.is_mixed])["mape"] <= 0.10


def test_a_stage_of_sailor_is_read_with_its_chips():
    case = next(case for case in sets.sailor_cases() if case.name == "mit/N4/N4_D1")
    stages = case.plan.pipelines[0].stages
    assert [stage.group for stage in stages] == ["RTX-3090", "RTX-2080", "Titan-RTX", "RTX-2080"]
    assert [stage.first_device for stage in stages] == [0, 0, 0, 8]
    assert [stage.num_layers for stage in stages] == [5, 7, 7, 7]


def test_rtx_3090_nodes_hold_everybody_up():
    case = next(case for case in sets.sailor_cases() if case.name == "mit/N4/N4_D1")
    slow = case.cluster.link("RTX-3090", 0, "Titan-RTX", 0).transfer_s(1e7)
    fast = case.cluster.link("RTX-2080", 0, "Titan-RTX", 0).transfer_s(1e7)
    assert slow > 20 * fast


def test_a_model_that_no_chip_was_profiled_with_is_refused():
    folder = sets.DATA / "sailor"
    with pytest.raises(UserError, match="no profile"):
        sailor_set.cases(
            (folder / "measured-plans.csv").read_text(),
            (folder / "llm_info.json").read_text(),
            (folder / "network_coeffs.json").read_text(),
            {("OPT-350", "GH-96"): (folder / "OPT-350__GH-96.json").read_text()},
        )


def test_vtrain_is_a_full_grid_and_was_composed():
    cases = sets.vtrain_cases("none")
    assert len(cases) == 1440
    assert len({(c.plan.fingerprint, c.hidden) for c in cases}) == 1440
    assert vtrain.is_composed(cases)
    shaken = [
        replace(case, measured_s=case.measured_s * (1 + 1e-4 * (n % 7)))
        for n, case in enumerate(cases)
    ]
    assert not vtrain.is_composed(shaken)


def half():
    rows = sets.vtrain_cases("none")
    return [case for case in rows if case.num_blocks in (20, 24)]


def test_vtrain_test_half_is_within_eight_percent_with_seven_constants():
    rows = half()[::3]
    predicted = sets.roofline_seconds(rows, fits.roofline())
    found = scores(predicted, [case.measured_s for case in rows])
    assert found["mape"] <= 0.08
    assert found["spearman"] >= 0.98


def test_vtrain_test_half_is_within_one_percent_with_profiles_of_the_other_half():
    rows = half()[::3]
    predicted = sets.profile_seconds(rows, fits.load("vtrain-profiles")["profiles"])
    assert scores(predicted, [case.measured_s for case in rows])["mape"] <= 0.01


def test_published_runs_that_nothing_was_fitted_on_are_near():
    rows = [row for row in bench.published_part()["rows"] if "error" in row]
    assert len(rows) >= len(CASES) - 1
    a100 = [abs(row["error"]) for row in rows if row["name"].startswith("GPT")]
    assert len(a100) == 8
    assert sum(a100) / len(a100) <= 0.08
    assert max(abs(row["error"]) for row in rows) <= 0.25
