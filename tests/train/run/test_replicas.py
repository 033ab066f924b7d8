"""Copies of a layer on different chips are the same bits behind each checkpoint."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mxn.train.plan.plan import TrainPlan
from mxn.train.run.replicas import BUDGET, _take
from support import parity_cases
from support.parity_cases import plan_of
from support.ranks import run_ranks

WHOLE = [(0, 6)]
TIED = {"0 model.embed_tokens.weight", "5 lm_head.weight"}


def run(plan: TrainPlan, dtypes: list[str], **more):
    is_wide = any(stage.tp > 1 for pipeline in plan.pipelines for stage in pipeline.stages)
    model = str(parity_cases.small_model(is_for_teams=is_wide))
    return run_ranks(
        "support.replica_cases:align", ["cpu"] * plan.num_devices,
        {"plan": plan.to_json(), "model": model, "dtypes": dtypes, **more},
    )  # fmt: skip


def held(ranks, when: str) -> dict[str, set[str]]:
    """Return the digests of each tensor on all ranks; the tied matrix is one tensor."""
    found: dict[str, set[str]] = {}
    for rank in ranks:
        for name, digest in rank[when].items():
            tensor, _, part = name.rpartition(".")
            found.setdefault(f"tied.{part}" if tensor in TIED else name, set()).add(digest)
    return found


PLANS = {
    "two pipelines": (plan_of((2, [WHOLE]), (2, [WHOLE])), ["float32", "bfloat16"]),
    # Of one pipeline only the tied matrix is on two chips.
    "two stages": (plan_of((4, [[(0, 3)], [(3, 6)]])), ["bfloat16", "float32"]),
    "cut differently": (
        plan_of((2, [[(0, 2)], [(2, 6)]]), (2, [[(0, 5)], [(5, 6)]])),
        ["float32", "float32", "bfloat16", "bfloat16"],
    ),
    "a team beside one": (
        plan_of((2, [WHOLE]), (2, [WHOLE]), tps=[2, 1]),
        ["bfloat16", "bfloat16", "float32"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_one_copy_is_given_to_the_others(name):
    """CPUs in two dtypes stand for two chips: their weights begin with other roundings."""
    plan, dtypes = PLANS[name]
    ranks = run(plan, dtypes, push=BUDGET / 10)
    assert all(len(digests) == 1 for digests in held(ranks, "at start").values())
    assert any(len(digests) > 1 for digests in held(ranks, "pushed").values())
    assert all(len(digests) == 1 for digests in held(ranks, "aligned").values())
    for rank in ranks:
        assert rank["apart"] == ranks[0]["apart"] == pytest.approx(BUDGET / 10, rel=0.05)
        assert rank["begin"] > 1e-4  # bfloat16 rounds to 8 bits


def test_copies_further_apart_than_rounding_stop_the_job_on_all_ranks():
    ranks = run(*PLANS["two pipelines"], push=0.01)
    assert ranks[0]["error"] == ranks[1]["error"]
    assert "weights of layer" in ranks[0]["error"]
    assert "on rank 1 (cpu" in ranks[0]["error"]
    assert "1.0e-02 away from their copy on another chip" in ranks[0]["error"]


@pytest.mark.parametrize(("own", "given"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0),
                                            (1.0, math.inf), (math.inf, math.inf)])  # fmt: skip
def test_weights_that_are_no_number_are_no_float_noise(own, given):
    names = ("a.master", "b.master")
    state = {name: torch.tensor([2.0, 1.0]) for name in names}
    other = {name: torch.tensor([2.0, 1.0]) for name in names}
    state["a.master"][1], other["a.master"][1] = own, given
    assert _take(state, other) == math.inf
    assert all(torch.equal(state[n], other[n]) or n == "a.master" for n in names)


def test_copies_that_are_no_number_stop_the_job_on_all_ranks():
    ranks = run(*PLANS["two pipelines"], push=math.nan)
    assert ranks[0]["error"] == ranks[1]["error"]
    assert "on rank 1 (cpu" in ranks[0]["error"]
    assert "inf away from their copy on another chip" in ranks[0]["error"]


def test_chips_that_are_alike_send_nothing():
    ranks = run(PLANS["two pipelines"][0], ["float32"] * 2, push=0.0)
    assert [rank["apart"] for rank in ranks] == [None, None]


def test_of_a_divided_optimizer_only_the_tied_matrix_is_held_twice():
    plan = replace(PLANS["two pipelines"][0], shards_optimizer=True)
    ranks = run(plan, ["float32", "bfloat16"], push=BUDGET / 10)
    assert all(len(digests) == 1 for digests in held(ranks, "aligned").values())
