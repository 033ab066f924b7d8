"""Rounds of a measurement: when they are enough, and what they say."""

from __future__ import annotations

import pytest

from mxn.train.run.layer_times import Block
from mxn.train.run.rounds import Rounds

BLOCK, HEAD = ("block", 1, 1), ("head", 1, 1)


def block(seconds: float) -> Block:
    return Block(seconds, 2 * seconds, seconds, 0.1)


def measured(*totals: float) -> Rounds:
    """Rounds of two cases, of which the first takes twice as long."""
    rounds = Rounds({BLOCK: 10.0, HEAD: 20.0})
    for total in totals:
        rounds.begin()
        rounds.add(BLOCK, (block(2 * total), block(2 * total)))
        rounds.add(HEAD, (block(total),) * 3)
    return rounds


def test_one_round_does_not_say_how_sure_it_is():
    rounds = measured(1.0)
    assert not rounds.are_enough
    assert [reading.error for reading in rounds.readings()] == [None, None]
    assert Rounds().are_enough  # of nothing
    assert Rounds().readings() == ()


def test_rounds_that_agree_are_enough_and_plateaus_want_more():
    assert not measured(1.0, 1.0, 1.0).are_enough  # on one plateau, or by chance
    assert measured(1.0, 1.01, 1.0, 1.01).are_enough
    assert not measured(1.0, 1.2, 1.0, 1.2).are_enough
    many = measured(*[1.0, 1.2] * 50)
    assert many.are_enough
    for reading in many.readings():
        assert reading.error == pytest.approx(0.1 / 1.1 / 99**0.5)


def test_readings_are_of_all_rounds():
    first, second = measured(1.0, 1.0, 2.0, 2.0).readings()
    assert (first.kind, first.repeats, second.kind, second.repeats) == ("block", 8, "head", 12)
    assert first.cost.forward_s == pytest.approx(3.0)
    assert first.cost.backward_s == pytest.approx(6.0)
    assert (first.cost.activation_bytes, second.cost.activation_bytes) == (10.0, 20.0)
    assert second.noise == pytest.approx((2 - 1) / 2 / 1.5)


@pytest.mark.parametrize("stopped", [Block(80.0, 2.0, 1.0, 0.1), Block(1.0, 2.0, 1.0, 80.0)])
def test_a_block_with_a_stop_in_it_is_none_of_the_device(stopped):
    rounds = Rounds({BLOCK: 10.0})
    rounds.begin()
    rounds.add(BLOCK, (block(1.0), stopped, block(2.0)))
    (reading,) = rounds.readings()
    assert reading.repeats == 2
    assert reading.cost.forward_s == pytest.approx(1.5)
    assert reading.cost.optimizer_s == pytest.approx(0.1)
