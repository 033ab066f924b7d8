"""Orders made from times: valid, within the memory, and no worse than the fixed ones."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.errors import CapacityError, UnsupportedError
from mxn.train.plan.automatic import automatic_order, best_order, extra_for_links
from mxn.train.plan.events import simulate
from mxn.train.plan.order_check import validate
from mxn.train.plan.schedules import order, stored_peak
from mxn.train.plan.times import Hop, PipelineTimes


@st.composite
def _uneven(draw):
    stages = draw(st.integers(1, 5))

    def rows(low, high):
        return tuple((draw(st.integers(low, high)) / 4,) for _ in range(stages))

    def hops():
        seconds = st.sampled_from([0.0, 0.5, 3.0])
        return tuple(Hop(draw(seconds), draw(seconds)) for _ in range(stages - 1))

    return PipelineTimes(
        forward_s=rows(1, 8),
        backward_s=rows(8, 16),
        weight_s=rows(1, 7),
        forward_hops=hops(),
        backward_hops=hops(),
    )


@settings(max_examples=40, deadline=None)
@given(_uneven(), st.integers(1, 9), st.data())
def test_automatic_orders_are_complete_and_keep_within_the_memory(times, batches, data):
    limits = [data.draw(st.integers(1, 6)) for _ in range(times.num_stages)]
    for splits in (False, True):
        rows = automatic_order(times, batches, limits, splits_weights=splits)
        validate(rows, num_chunks=1, num_micro_batches=batches)
        assert all(stored_peak(row) <= limit for row, limit in zip(rows, limits, strict=True))


@settings(max_examples=25, deadline=None)
@given(_uneven(), st.integers(1, 9))
def test_the_best_order_is_not_longer_than_a_fixed_one_with_the_same_memory(times, batches):
    num = times.num_stages
    limits = [num] * num
    best = best_order(times, batches, limits, splits_weights=True)
    assert all(peak <= num for peak in best.stored_peak)
    for schedule in ("1f1b", "zero-bubble"):
        fixed = simulate(order(schedule, num, 1, batches), times)
        assert best.makespan_s <= fixed.makespan_s + 1e-9


def test_even_stages_reach_the_last_stages_bound_with_split_backwards():
    times = PipelineTimes.even(4, forward_s=1.0, backward_s=2.0)
    best = best_order(times, 12, [4] * 4, splits_weights=True)
    # The last stage cannot begin before three forwards, and is never idle after.
    assert best.makespan_s == pytest.approx(3.0 + 12 * 3.0)


def test_a_slow_link_is_hidden_by_as_many_more_micro_batches_as_fit_into_the_round_trip():
    hops = (Hop(0.0), Hop(4.0), Hop(0.0))
    even = PipelineTimes.even(4, forward_s=1.0, backward_s=2.0)
    times = PipelineTimes(
        forward_s=even.forward_s,
        backward_s=even.backward_s,
        weight_s=even.weight_s,
        forward_hops=hops,
        backward_hops=hops,
    )
    assert extra_for_links(times) == (3, 3, 0, 0)
    plain = simulate(order("1f1b", 4, 1, 30), times)
    ahead = simulate(order("1f1b", 4, 1, 30, extra_warmup=(3, 3, 0, 0)), times)
    # The link is slower than a pass either way, so it sets the pace: 30 times 4 s, and the ends.
    assert ahead.makespan_s < 0.9 * plain.makespan_s
    assert ahead.makespan_s == pytest.approx(30 * 4.0, rel=0.2)


def test_a_stage_that_can_store_nothing_is_named():
    times = PipelineTimes.even(2, forward_s=1.0, backward_s=2.0)
    with pytest.raises(CapacityError, match="stage 1 can store 0 micro-batches, it needs 1"):
        best_order(times, 4, [2, 0])


def test_chunks_are_refused():
    times = PipelineTimes.even(2, forward_s=1.0, backward_s=2.0, num_chunks=2)
    with pytest.raises(UnsupportedError, match="one chunk per stage only, got 2"):
        best_order(times, 4, [2, 2])
