"""A stage cut over several ranks learns what one device learns, in every company of other stages."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from mxn.chips.sim.testing import skip_reason
from support import parity_cases
from support.parity_cases import plan_of
from support.ranks import run_ranks

STEPS = 10
LOSS_NOISE = 2e-5
WHOLE = [(0, 6)]

needs_sim = pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))

PLANS = {
    "one stage of two": plan_of((8, [WHOLE]), tps=[2]),
    "two stages of two": plan_of((8, [[(0, 2)], [(2, 6)]]), tps=[2, 2]),
    "two pipelines of two": plan_of((5, [WHOLE]), (3, [WHOLE]), tps=[2, 2]),
    "two beside one": plan_of((5, [WHOLE]), (3, [WHOLE]), tps=[2, 1]),
    "two, then one": plan_of((8, [[(0, 3)], [(3, 6)]]), tps=[2, 1]),
    "one, then two": plan_of((8, [[(0, 3)], [(3, 6)]]), tps=[1, 2]),
    "cut differently and of several widths": plan_of(
        (5, [[(0, 2)], [(2, 6)]]), (3, [[(0, 5)], [(5, 6)]]), tps=[2, 1, 1, 2]
    ),
    "interleaved": plan_of(
        (8, [[(0, 2), (3, 4)], [(2, 3), (4, 6)]]), schedule="interleaved", tps=[2, 1]
    ),
    "zero-bubble": plan_of((8, [[(0, 2)], [(2, 6)]]), schedule="zero-bubble", tps=[2, 2]),
    "recompute full": plan_of((8, [[(0, 3)], [(3, 6)]]), recompute="full", tps=[2, 1]),
}


@cache
def model() -> str:
    return str(parity_cases.small_model(is_for_teams=True))


@cache
def reference(steps: int, **changes: Any) -> dict[str, Any]:
    return parity_cases.single(steps, 8, model=model(), **changes)


def run(name: str, steps: int = STEPS, devices: list[str] | None = None, **more: Any):
    plan = PLANS[name]
    return run_ranks(
        "support.parity_cases:train",
        devices or ["cpu"] * plan.num_devices,
        {"plan": plan.to_json(), "steps": steps, "model": model(), **more},
    )


def check(ranks: list[dict[str, Any]], want: dict[str, Any], noise: float = LOSS_NOISE) -> None:
    for rank in ranks:
        assert rank["loss"] == ranks[0]["loss"]
        assert rank["loss"] == pytest.approx(want["loss"], rel=noise)
        assert rank["norm"] == pytest.approx(want["norm"], rel=100 * noise)
    assert want["loss"][-1] < want["loss"][0] - 0.2
    seen: dict[str, str] = {}
    for rank in ranks:
        for weight, digest in rank["digests"].items():
            assert seen.setdefault(weight, digest) == digest, f"{weight} differs between holders"


@pytest.mark.parametrize("name", PLANS)
def test_a_cut_stage_trains_as_one_device_does(name):
    check(run(name), reference(STEPS))
