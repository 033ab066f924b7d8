"""A stage cut over several ranks learns what one device learns, whatever stages are around it."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from mxn.chips.sim.testing import skip_reason
from mxn.train.run.job import Job, ModelSettings, metrics_path
from mxn.train.run.launch import launching_of
from mxn.train.run.placement import Placement
from mxn.train.run.track import read_metrics
from support import parity_cases
from support.forked_ranks import ForkedRanks
from support.launches import group, on_one_device, small_job
from support.parity_cases import plan_of
from support.ranks import run_ranks

STEPS = 8
MICRO_BATCHES = 3
LOSS_NOISE = 2e-5
WHOLE = [(0, 6)]

needs_sim = pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))

PLANS = {
    "one stage of two": plan_of((3, [WHOLE]), tps=[2]),
    "two stages of two": plan_of((3, [[(0, 2)], [(2, 6)]]), tps=[2, 2]),
    "two pipelines of two": plan_of((2, [WHOLE]), (1, [WHOLE]), tps=[2, 2]),
    "two beside one": plan_of((2, [WHOLE]), (1, [WHOLE]), tps=[2, 1]),
    "two, then one": plan_of((3, [[(0, 3)], [(3, 6)]]), tps=[2, 1]),
    "one, then two": plan_of((3, [[(0, 3)], [(3, 6)]]), tps=[1, 2]),
    "cut differently and of several widths": plan_of(
        (2, [[(0, 2)], [(2, 6)]]), (1, [[(0, 5)], [(5, 6)]]), tps=[2, 1, 1, 2]
    ),
    "interleaved": plan_of(
        (4, [[(0, 2), (3, 4)], [(2, 3), (4, 6)]]), schedule="interleaved", tps=[2, 1]
    ),
    "zero-bubble": plan_of((3, [[(0, 2)], [(2, 6)]]), schedule="zero-bubble", tps=[2, 1]),
    "recompute full": plan_of((3, [[(0, 3)], [(3, 6)]]), recompute="full", tps=[1, 2]),
}
QUICK = ("one stage of two", "two stages of two", "two beside one", "one, then two")


@cache
def model() -> str:
    return str(parity_cases.small_model(is_for_teams=True))


@cache
def reference(steps: int, micro_batches: int, **changes: Any) -> dict[str, Any]:
    return parity_cases.single(steps, micro_batches, model=model(), **changes)


def run(
    name: str, devices: list[str] | None = None, *, shards_optimizer: bool = False, **more: Any
) -> list[dict[str, Any]]:
    plan = replace(PLANS[name], shards_optimizer=shards_optimizer)
    arguments = {"plan": plan.to_json(), "steps": STEPS, "model": model(), **more}
    devices = devices or ["cpu"] * plan.num_devices
    return run_ranks("support.parity_cases:train", devices, arguments)


def check(ranks: list[dict[str, Any]], want: dict[str, Any], noise: float = LOSS_NOISE) -> None:
    for rank in ranks:
        assert rank["loss"] == ranks[0]["loss"]
        assert rank["loss"] == pytest.approx(want["loss"], rel=noise)
        assert rank["norm"] == pytest.approx(want["norm"], rel=100 * noise)
    seen: dict[str, str] = {}
    for rank in ranks:
        for weight, digest in rank["digests"].items():
            assert seen.setdefault(weight, digest) == digest, f"{weight} differs between holders"


def test_the_reference_learns():
    """Otherwise equal losses would mean little."""
    losses = reference(STEPS, MICRO_BATCHES)["loss"]
    assert losses[0] - losses[-1] > 100 * LOSS_NOISE * losses[0]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in PLANS]
)
def test_a_cut_stage_trains_as_one_device_does(name):
    check(run(name), reference(STEPS, PLANS[name].micro_batches))


def test_adapters_train_as_on_one_device():
    ranks = run("two beside one", lora=True)
    want = reference(STEPS, MICRO_BATCHES, lora=True)
    for rank in ranks:
        assert rank["loss"] == pytest.approx(want["loss"], rel=LOSS_NOISE)
        assert rank["norm"] == pytest.approx(want["norm"], rel=100 * LOSS_NOISE)


def test_a_team_computes_in_bfloat16_beside_float32():
    ranks = run("two beside one", dtypes=["bfloat16", "bfloat16", "float32"])
    want = reference(STEPS, MICRO_BATCHES)
    assert ranks[0]["loss"] == pytest.approx(want["loss"], rel=2e-2)
    assert ranks[0]["loss"][-1] < ranks[0]["loss"][0]


@pytest.mark.parametrize("name", ["two beside one", "two pipelines of two"])
def test_divided_optimizer_state_changes_nothing_but_memory(name):
    whole, divided = run(name), run(name, shards_optimizer=True)
    check(divided, reference(STEPS, MICRO_BATCHES))
    assert [rank["loss"] for rank in divided] == [rank["loss"] for rank in whole]
    assert sum(rank["slots"] for rank in divided) < 0.8 * sum(rank["slots"] for rank in whole)


@needs_sim
def test_a_team_of_another_maker_beside_the_cpu():
    """The team sums through its maker's collective; the CPU is reached over the bridge."""
    check(run("two beside one", devices=["sim:0", "sim:1", "cpu"]), reference(STEPS, MICRO_BATCHES))


def losses(job: Job) -> list[float]:
    return [line["loss"] for line in read_metrics(metrics_path(job))]


def to_end(job: Job, name: str, **more: int) -> None:
    launching = launching_of(job, PLANS[name], **more)
    launching.log_folder.mkdir(parents=True, exist_ok=True)
    ranks = ForkedRanks(launching, {})
    deadline = time.monotonic() + 150
    while not ranks.have_ended() and not ranks.deaths() and time.monotonic() < deadline:
        time.sleep(0.02)
    logs = [log.read_text()[-800:] for log in launching.log_folder.glob("*.log")]
    dead, is_done = ranks.deaths(), ranks.have_ended()
    ranks.kill()
    assert is_done, logs
    assert not dead, logs


def test_any_width_goes_on_from_the_checkpoint_of_any_other(tmp_path):
    job = small_job(
        tmp_path,
        6,
        [group(count=4)],
        model=ModelSettings(source=model(), begin="scratch"),
        global_batch=MICRO_BATCHES,
    )
    job = Job.from_json(job.to_json().replace('"every_steps": 3', '"every_steps": 2'))
    want = on_one_device(job)
    to_end(job, "one stage of two")
    assert losses(job) == pytest.approx(want, rel=LOSS_NOISE)
    to_end(job, "one, then two", launch=1, resume_step=2)
    assert losses(job) == pytest.approx(want, rel=LOSS_NOISE)
    to_end(job, "two beside one", launch=2, resume_step=4)
    assert losses(job) == pytest.approx(want, rel=LOSS_NOISE)


def test_ranks_of_a_team_stand_side_by_side():
    placement = Placement(PLANS["cut differently and of several widths"])
    assert placement.all_teams() == [(0, 1), (2,), (3,), (4, 5)]
    assert [place.index for place in placement.places] == [0, 1, 0, 0, 0, 1]
    assert placement.holders(index=1)[5] == [2, 5]
    # Equal widths sum part by part, others the whole.
    assert placement.sharers([0]) == [(0, 1, 3)]
    assert placement.sharers([3]) == [(2, 3)]
    assert list(placement.channels()) == [
        (0, 2, "F0"), (2, 0, "B0"), (3, 4, "F0"), (4, 3, "B0")
    ]  # fmt: skip
    wide = Placement(PLANS["two pipelines of two"])
    assert wide.sharers([3]) == [(0, 2), (1, 3)]
    assert wide.peer(1, 0) == 1


def test_a_team_over_two_makers_is_refused_by_name():
    with pytest.raises(
        AssertionError, match=r"tensor parallelism over rank 0 .* islands 'a' and 'b'"
    ):
        run_ranks(
            "support.parity_cases:train",
            ["cpu", "cpu"],
            {"plan": PLANS["one stage of two"].to_json(), "steps": 4, "model": model()},
            islands=["a", "b"],
        )
