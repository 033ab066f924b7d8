"""Rounds of a measurement: when they are enough, and what they say."""

from __future__ import annotations

import pytest

from mxn.train.run.layer_times import Block
from mxn.train.run.rounds import Rounds

BLOCK, HEAD = ("block", 1, 1), ("head", 1, 1)


def block(seconds: float) -> Block:
    return Block(seconds, 2 * seconds, seconds, 0.1, 4 * seconds)


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


def stopped(seconds: float) -> Block:
    """A block with a stop in its pass for gradients of inputs, which nothing else tells."""
    return block(seconds)._replace(weight_s=0.0, each_s=100.0 * seconds)


def test_a_block_with_a_stop_in_it_is_none_of_the_device():
    rounds = Rounds({BLOCK: 10.0})
    for blocks in (
        (block(1.0), stopped(1.0), block(2.0)),
        (block(2.0), stopped(2.0), stopped(2.0)),
        (stopped(1.0),),  # a round of which nothing is left
        (block(1.0), block(1.0), block(2.0)),
    ):
        rounds.begin()
        rounds.add(BLOCK, blocks)
    (reading,) = rounds.readings()
    assert (reading.repeats, reading.stopped) == (6, 4)
    assert reading.cost.forward_s == pytest.approx(1.5)
    assert reading.cost.weight_s == pytest.approx(1.5)
    assert reading.error == pytest.approx(0.1243, rel=1e-3)  # of 4.5, 6 and 4
    assert not rounds.are_enough  # three rounds count


def test_a_device_of_two_speeds_is_measured_at_both():
    rounds = Rounds({BLOCK: 10.0})
    rounds.begin()
    rounds.add(BLOCK, (block(1.0), block(1.0), block(3.0), block(3.0)))
    (reading,) = rounds.readings()
    assert (reading.repeats, reading.stopped) == (4, 0)
