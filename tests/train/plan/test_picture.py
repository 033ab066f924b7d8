"""The picture of a whole plan: its names, its figures, and what it leaves out."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from mxn.train.plan.picture import plan_lanes, plan_svg, plan_text
from mxn.train.plan.simulate import simulate_plan
from support import tiny_plans


@pytest.fixture(scope="module")
def simulation():
    plan = tiny_plans.plan(
        tiny_plans.pipeline([4, 8], "ab", 4),
        tiny_plans.pipeline([8], "a", 6, first_device=8, tp=2),
        tiny_plans.pipeline([8], "a", 6, first_device=16, tp=2),
    )
    return simulate_plan(plan, tiny_plans.shape(6), tiny_plans.cluster(), tiny_plans.PROFILES)


def _words(picture):
    root = ElementTree.fromstring(picture)
    return [at.text or "" for at in root.iter("{http://www.w3.org/2000/svg}text")]


def test_each_stage_has_its_chip_and_layers_and_pipelines_alike_are_drawn_once(simulation):
    lanes = plan_lanes(simulation)
    assert [(lane.label, lane.detail) for lane in lanes] == [
        ("0.0 fast", "layers 0-3"),
        ("0.1 slow", "layers 4-7"),
        ("1.0 fast x 2", "layers 0-7, 2 alike"),
    ]


def test_title_and_figures_are_those_of_the_plan(simulation):
    words = _words(plan_svg(simulation))
    made = simulation.prediction
    assert words[0] == "tiny: 1f1b, 16 micro-batches, 3 pipelines"
    assert words[1] == "6 devices: 5 fast + 1 slow"
    for figure in (
        f"{made.tokens_per_s:,.0f} tokens/s",
        f"bubble {made.bubble * 100:.1f} %",
        f"MFU {made.mfu * 100:.1f} %",
        f"simulated from {made.basis} figures",
    ):
        assert figure in words[2]


def test_sums_and_optimizer_follow_the_passes(simulation):
    for lane in plan_lanes(simulation):
        kinds = [span.kind for span in lane.spans]
        assert kinds[-1] == "optimizer"
        assert "reduce" in kinds
        ends = [span.end_s for span in lane.spans]
        assert ends == sorted(ends)
        assert ends[-1] == pytest.approx(simulation.prediction.iteration_s)


def test_kinds_that_are_not_drawn_are_counted(simulation):
    words = _words(plan_svg(simulation, max_kinds=1))
    assert "1 of 2 kinds of pipelines drawn" in words[2]
    assert not any("1.0" in word for word in words)


def test_text_fits_its_columns(simulation):
    lines = plan_text(simulation, columns=90).splitlines()
    assert lines[1] == "6 devices: 5 fast + 1 slow"
    lanes = [line for line in lines if "|" in line]
    assert len(lanes) == 3
    assert {len(line) for line in lanes} == {90}


def test_one_pipeline_needs_no_number(simulation):
    one = replace(simulation.plan, pipelines=simulation.plan.pipelines[:1])
    alone = simulate_plan(one, tiny_plans.shape(6), tiny_plans.cluster(), tiny_plans.PROFILES)
    assert plan_lanes(alone)[0].label == "0 fast"
