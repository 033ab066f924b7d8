"""Learning rates: their shapes, their ends, and what is no schedule."""

from __future__ import annotations

import pytest

from mxn.errors import ConfigError
from mxn.train.run.schedule import SHAPES, Schedule, learning_rate


def rates(**options) -> list[float]:
    schedule = Schedule(peak=1.0, num_steps=10, **options)
    return [learning_rate(schedule, step) for step in range(10)]


def test_a_warm_up_is_linear_and_begins_above_zero():
    assert rates(shape="constant", warmup_steps=4) == [0.25, 0.5, 0.75, *[1.0] * 7]


def test_linear_and_cosine_fall_to_the_floor():
    assert rates(shape="linear") == pytest.approx([1 - n / 10 for n in range(10)])
    cosine = rates(shape="cosine", floor=0.2)
    assert cosine[0] == 1.0
    assert cosine[5] == pytest.approx(0.6)
    assert cosine == sorted(cosine, reverse=True)
    assert 0.2 < cosine[-1] < 0.25


def test_wsd_stays_and_then_falls():
    got = rates(shape="wsd", warmup_steps=2, decay_steps=4, floor=0.0)
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert rates(shape="wsd")[-1] == 1.0  # the default decay of a tenth is one step, its first


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_behind_the_end_stay_at_the_floor(shape):
    schedule = Schedule(peak=2.0, num_steps=5, shape=shape, floor=0.1)
    want = 2.0 if shape == "constant" else 0.2
    assert learning_rate(schedule, 5) == learning_rate(schedule, 500) == pytest.approx(want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peak": -1.0}, "at least 0"),
        ({"peak": float("nan")}, "at least 0"),
        ({"num_steps": 0}, "at least 1 step"),
        ({"warmup_steps": 11}, "0 to 10"),
        ({"floor": 2.0}, "0 to 1"),
        ({"decay_steps": 11}, "decay_steps"),
        ({"shape": "step"}, "none of constant"),
    ],
)
def test_what_is_no_schedule_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**{"peak": 1.0, "num_steps": 10} | options)
