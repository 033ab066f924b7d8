"""A job on many ranks is the job on one device: the same losses, the same weights on all holders.

The differences allowed are those of float32 sums in another order.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from mxn.chips.sim.testing import skip_reason
from mxn.train.plan.plan import TrainPlan
from support import parity_cases
from support.parity_cases import plan_of
from support.ranks import run_ranks

STEPS = 12  # the slow tests do 200
CASE = "support.parity_cases:train"
LOSS_NOISE = 2e-5  # relative; doubling the batch's order gives as much after 20 steps
WHOLE = [(0, 6)]

needs_sim = pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))

PLANS = {
    "two uneven stages": plan_of((8, [[(0, 2)], [(2, 6)]])),
    "three uneven stages": plan_of((8, [[(0, 1)], [(1, 5)], [(5, 6)]])),
    "gpipe": plan_of((8, [[(0, 4)], [(4, 6)]]), schedule="gpipe"),
    "data-parallel 5:2:1": plan_of((5, [WHOLE]), (2, [WHOLE]), (1, [WHOLE])),
    "pipelines cut differently": plan_of((5, [[(0, 2)], [(2, 6)]]), (3, [[(0, 5)], [(5, 6)]])),
    "a pipeline beside a single": plan_of((3, [[(0, 3)], [(3, 6)]]), (5, [WHOLE])),
    "interleaved": plan_of((8, [[(0, 2), (3, 4)], [(2, 3), (4, 6)]]), schedule="interleaved"),
    "zero-bubble": plan_of((8, [[(0, 2)], [(2, 4)], [(4, 6)]]), schedule="zero-bubble"),
    "zero-bubble with chunks beside another": plan_of(
        (6, [[(0, 2), (3, 4)], [(2, 3), (4, 6)]]),
        (2, [[(0, 3), (3, 6)]]),
        schedule="zero-bubble",
    ),
    "recompute full": plan_of((8, [[(0, 3)], [(3, 6)]]), recompute="full"),
    "recompute selective": plan_of((8, [[(0, 3)], [(3, 6)]]), recompute="selective"),
    "recompute full, zero-bubble": plan_of(
        (8, [[(0, 3)], [(3, 6)]]), recompute="full", schedule="zero-bubble"
    ),
}


@cache
def reference(steps: int, micro_batches: int, lora: bool = False) -> dict[str, Any]:
    return parity_cases.single(steps, micro_batches, **({"lora": True} if lora else {}))


@cache
def model() -> str:
    return str(parity_cases.small_model())


def run(plan: TrainPlan, steps: int = STEPS, devices: list[str] | None = None, **more: Any):
    options = more.pop("options", None)
    return run_ranks(
        CASE,
        devices or ["cpu"] * plan.num_devices,
        {"plan": plan.to_json(), "steps": steps, "model": model(), **more},
        options=options,
    )


@cache
def mixed(name: str, wire_dtype: str, *, is_divided: bool = False) -> list[dict[str, Any]]:
    """Return what ranks of two makers say; two runs have the same bits, so one will do."""
    plan = replace(PLANS[name], shards_optimizer=is_divided)
    devices = ["cpu", "sim:0", "cpu", "sim:1"][: plan.num_devices]
    return run(plan, devices=devices, options={"wire_dtype": wire_dtype})


def check(ranks: list[dict[str, Any]], want: dict[str, Any], noise: float = LOSS_NOISE) -> None:
    for rank in ranks:
        assert rank["loss"] == ranks[0]["loss"]
        assert rank["norm"] == ranks[0]["norm"]
        assert rank["loss"] == pytest.approx(want["loss"], rel=noise)
        assert rank["norm"] == pytest.approx(want["norm"], rel=100 * noise)
    assert want["loss"][-1] < want["loss"][0] - 0.3  # it learns, or equal would mean little
    seen: dict[str, str] = {}
    for rank in ranks:
        for name, digest in rank["digests"].items():
            assert seen.setdefault(name, digest) == digest, f"{name} differs between its holders"


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_trains_as_one_device_does(name):
    check(run(PLANS[name]), reference(STEPS, 8))


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("data-parallel 5:2:1", {"3": [1, 3, 4], "9": [2, 5, 1]}),
        ("pipelines cut differently", {"2": [2, 6], "3": [7, 1]}),
        ("zero-bubble with chunks beside another", {"4": [4, 4]}),
    ],
)
def test_micro_batches_change_hands_and_training_does_not(name, counts):
    check(run(PLANS[name], counts=counts), reference(STEPS, 8))


def test_ranks_that_disagree_on_micro_batches_stop():
    """Rows would be learnt twice or left out otherwise, and nobody would see it."""
    with pytest.raises(AssertionError, match="ranks disagree on who does which micro-batches"):
        run_ranks(
            "support.parity_cases:train_apart",
            ["cpu", "cpu"],
            {"plan": plan_of((5, [WHOLE]), (3, [WHOLE])).to_json(), "model": model()},
        )


def test_tied_copies_stay_equal():
    ranks = run(PLANS["three uneven stages"], steps=5)
    digests = {name: digest for rank in ranks for name, digest in rank["digests"].items()}
    copies = [digest for name, digest in digests.items() if "embed" in name or "lm_head" in name]
    assert len(copies) == 2
    assert copies[0] == copies[1]


def test_lora_trains_as_on_one_device():
    plan = plan_of((5, [[(0, 1)], [(1, 6)]]), (3, [WHOLE]))
    ranks = run(plan, lora=True)
    want = reference(STEPS, 8, lora=True)
    for rank in ranks:
        assert rank["loss"] == pytest.approx(want["loss"], rel=LOSS_NOISE)


@needs_sim
@pytest.mark.parametrize(
    ("name", "wire_dtype"),
    [
        ("data-parallel 5:2:1", "float32"),
        ("pipelines cut differently", "float32"),
        ("a pipeline beside a single", "bfloat16"),
    ],
)
def test_divided_optimizer_state_changes_nothing_but_memory(name, wire_dtype):
    whole, divided = mixed(name, wire_dtype), mixed(name, wire_dtype, is_divided=True)
    check(divided, reference(STEPS, 8), noise=5e-3 if wire_dtype == "bfloat16" else LOSS_NOISE)
    assert [rank["loss"] for rank in divided] == [rank["loss"] for rank in whole]
    assert sum(rank["slots"] for rank in divided) < 0.8 * sum(rank["slots"] for rank in whole)


@needs_sim
@pytest.mark.parametrize(
    "name",
    ["two uneven stages", "data-parallel 5:2:1", "a pipeline beside a single", "zero-bubble"],
)
def test_two_makers_train_as_one_device_does(name):
    check(mixed(name, "float32"), reference(STEPS, 8))


@needs_sim
@pytest.mark.parametrize("name", ["interleaved", "pipelines cut differently"])
def test_backends_that_ignore_tags_get_a_communicator_for_each_channel(name):
    devices = ["sim:0", "sim:1", "cpu", "cpu"][: PLANS[name].num_devices]
    check(run(PLANS[name], devices=devices, options={"is_untagged": True}), reference(STEPS, 8))


@needs_sim
def test_two_runs_of_two_makers_have_the_same_bits():
    plan, devices = PLANS["pipelines cut differently"], ["cpu", "sim:0", "sim:0", "cpu"]
    first, again = (run(plan, steps=4, devices=devices) for _ in range(2))
    assert [rank["digests"] for rank in first] == [rank["digests"] for rank in again]
    assert first[0]["loss"] == again[0]["loss"]


@needs_sim
def test_bf16_between_makers_stays_near_and_in_step_and_halves_the_bytes():
    name = "a pipeline beside a single"
    wide, ranks = mixed(name, "float32"), mixed(name, "bfloat16")
    want = reference(STEPS, 8)
    assert ranks[0]["loss"] == pytest.approx(want["loss"], rel=5e-3)
    assert ranks[0]["loss"] != want["loss"]
    check(ranks, want, noise=5e-3)
    assert ranks[0]["sent_bytes"]["1"] == wide[0]["sent_bytes"]["1"] / 2


def test_stages_of_different_dtypes_train_together():
    plan = PLANS["three uneven stages"]
    ranks = run(plan, dtypes=["float32", "bfloat16", "float32"])
    want = reference(STEPS, 8)
    assert ranks[0]["loss"] == pytest.approx(want["loss"], rel=2e-2)
    assert ranks[0]["loss"][-1] < ranks[0]["loss"][0] - 0.3


def test_an_owner_that_computes_in_bf16_gives_the_others_its_float32_weights():
    """They got what it computes with, so a float32 chip trained bf16 weights."""
    plan = replace(plan_of((3, [WHOLE]), (5, [WHOLE])), shards_optimizer=True)
    wide, narrow = run(plan, steps=4, dtypes=["float32", "bfloat16"])
    given = {name: digest for name, digest in narrow["masters"].items() if name[0] in "13"}
    assert given
    assert given.items() <= wide["digests"].items()
    assert not given.items() <= narrow["digests"].items()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["two uneven stages", "data-parallel 5:2:1", "pipelines cut differently"]
)
def test_two_hundred_steps_stay_together(name):
    plan = PLANS[name]
    check(run(plan, steps=200), reference(200, 8), noise=1e-3)


@needs_sim
@pytest.mark.slow
def test_two_hundred_steps_of_two_makers_stay_together():
    devices = ["cpu", "sim:0", "cpu"]
    plan = PLANS["a pipeline beside a single"]
    check(run(plan, steps=200, devices=devices), reference(200, 8), noise=1e-3)
