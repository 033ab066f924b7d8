"""The event simulator against a naive one, against closed forms and against its own bounds."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.errors import ConfigError
from mxn.train.plan.events import simulate
from mxn.train.plan.schedules import Action, order, split_backwards
from mxn.train.plan.times import Hop, PipelineTimes


def naive_times(rows, times):
    """Start and end of each (stage, action), by repeating the rules until nothing moves.

    Written from the rules, not from the simulator: dictionaries, no order of evaluation.
    """
    num, chunks = len(rows), times.num_chunks
    last = num * chunks - 1
    start, arrival = {}, {}

    def part_of(stage, action):
        return action.chunk * num + stage

    def length(stage, action):
        halves = split_backwards(rows[stage])
        both = times.backward_s[stage][action.chunk]
        half = times.weight_s[stage][action.chunk]
        if action.kind == "F":
            return times.forward_s[stage][action.chunk]
        if action.kind == "W":
            return half
        return both - half if (action.chunk, action.micro_batch) in halves else both

    def out_hop(stage, action):
        part = part_of(stage, action)
        if action.kind == "F" and part < last:
            return (part + 1) % num, times.forward_hops[part]
        if action.kind == "B" and part > 0:
            return (part - 1) % num, times.backward_hops[part - 1]
        return None

    def source(stage, action):
        part = part_of(stage, action)
        step = {"F": -1, "B": 1}.get(action.kind, 0)
        if step == 0 or not 0 <= part + step <= last:
            return None
        before = part + step
        return before % num, Action(action.kind, before // num, action.micro_batch)

    for stage, row in enumerate(rows):
        for action in row:
            start[stage, action] = arrival[stage, action] = 0.0
    moved = True
    while moved:
        moved = False
        for stage, row in enumerate(rows):
            for number, action in enumerate(row):
                free = 0.0
                if number:
                    previous = row[number - 1]
                    free = start[stage, previous] + length(stage, previous)
                    sent = out_hop(stage, previous)
                    free += sent[1].send_s if sent else 0.0
                came = source(stage, action)
                begin = free
                if came:
                    hop = out_hop(*came)[1]
                    begin = max(free + hop.receive_s, arrival[came])
                goes = out_hop(stage, action)
                there = arrival[stage, action]
                if goes:
                    to, hop = goes
                    there = begin + length(stage, action) + hop.send_s
                    if hop.link_s:
                        for other in row[:number]:
                            shares = out_hop(stage, other)
                            if shares and shares[0] == to and shares[1].link_s:
                                there = max(there, arrival[stage, other])
                        there += hop.link_s
                if begin > start[stage, action] + 1e-12 or there > arrival[stage, action] + 1e-12:
                    moved = True
                start[stage, action], arrival[stage, action] = begin, there
    return {key: (begin, begin + length(*key)) for key, begin in start.items()}


def _random_times(rng, stages, chunks, with_hops):
    def rows(low, high):
        return tuple(
            tuple(rng.randint(low, high) / 4 for _ in range(chunks)) for _ in range(stages)
        )

    def hops():
        def seconds():
            return rng.choice((0, 0, 1, 2, 5)) / 4 if with_hops else 0.0

        return tuple(Hop(seconds(), seconds(), seconds()) for _ in range(stages * chunks - 1))

    return PipelineTimes(
        forward_s=rows(1, 8),
        backward_s=rows(8, 16),
        weight_s=rows(1, 8),
        forward_hops=hops(),
        backward_hops=hops(),
    )


@st.composite
def _cases(draw):
    schedule = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zero-bubble"]))
    chunks = 1 if schedule in ("gpipe", "1f1b") else draw(st.integers(1, 3))
    stages, batches = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    extra = draw(st.integers(0, 2))
    rng = random.Random(draw(st.integers(0, 10**6)))
    rows = order(schedule, stages, chunks, batches, extra_warmup=extra)
    return rows, _random_times(rng, stages, chunks, draw(st.booleans()))


@settings(max_examples=60, deadline=None)
@given(_cases())
def test_every_pass_begins_when_the_naive_simulator_says(case):
    rows, times = case
    got = simulate(rows, times)
    want = naive_times(rows, times)
    for stage, row in enumerate(rows):
        for action, start, end in zip(row, got.starts_s[stage], got.ends_s[stage], strict=True):
            assert (start, end) == pytest.approx(want[stage, action]), (stage, action)


@settings(max_examples=60, deadline=None)
@given(_cases())
def test_a_step_is_never_shorter_than_its_slowest_stage_or_one_micro_batch(case):
    rows, times = case
    line = simulate(rows, times)
    batches = 1 + max(action.micro_batch for action in rows[0])
    work = [
        batches * (sum(forward) + sum(backward))
        for forward, backward in zip(times.forward_s, times.backward_s, strict=True)
    ]
    assert line.busy_s == pytest.approx(work)
    assert line.makespan_s >= max(work) - 1e-9
    # A micro-batch's path: all forwards and messages, then all input halves and messages back.
    path = sum(map(sum, times.forward_s)) + sum(map(sum, times.backward_s))
    if any(split_backwards(row) for row in rows):
        path -= sum(map(sum, times.weight_s))
    path += sum(hop.link_s + hop.send_s for hop in times.forward_hops + times.backward_hops)
    assert line.makespan_s >= path - 1e-9
    assert 0 <= line.bubble < 1
    for stage in range(len(rows)):
        total = line.busy_s[stage] + line.blocked_s[stage] + line.idle_s[stage]
        assert total == pytest.approx(line.makespan_s)
        assert line.idle_s[stage] >= -1e-9


@settings(max_examples=40, deadline=None)
@given(_cases())
def test_a_link_carries_one_message_at_a_time_in_each_direction(case):
    line = simulate(*case)
    sent_by_link = {}
    for transfer in line.transfers:
        sent_by_link.setdefault((transfer.from_stage, transfer.to_stage), []).append(transfer)
    for (from_stage, to_stage), sent in sent_by_link.items():
        hops = {"F": case[1].forward_hops, "B": case[1].backward_hops}
        on_wire = sorted(
            (transfer.start_s + hops[kind][border].send_s, transfer.end_s)
            for transfer in sent
            for kind, chunk, _ in [transfer.action]
            for border in [chunk * len(case[0]) + from_stage - (kind == "B")]
            if hops[kind][border].link_s
        )
        for (_, end), (start, _) in itertools.pairwise(on_wire):
            assert start >= end - 1e-9, (from_stage, to_stage)


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("batches", [1, 3, 8, 20])
def test_even_1f1b_and_gpipe_take_m_plus_s_minus_1_rounds(stages, batches):
    times = PipelineTimes.even(stages, forward_s=1.5, backward_s=2.5)
    for schedule in ("1f1b", "gpipe"):
        line = simulate(order(schedule, stages, 1, batches), times)
        assert line.makespan_s == pytest.approx((batches + stages - 1) * 4.0)
        assert line.bubble == pytest.approx((stages - 1) / (batches + stages - 1))


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_even_interleaving_divides_the_bubble_by_the_chunks(stages, chunks, rounds):
    batches = rounds * stages
    times = PipelineTimes.even(stages, forward_s=1.0, backward_s=2.0, num_chunks=chunks)
    line = simulate(order("interleaved", stages, chunks, batches), times)
    assert line.makespan_s == pytest.approx(3.0 * (chunks * batches + stages - 1))


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_even_zero_bubble_h1_leaves_a_third_of_the_bubble(stages):
    batches, forward, backward, weight = 3 * stages, 1.0, 2.0, 1.0
    times = PipelineTimes.even(stages, forward_s=forward, backward_s=backward, weight_s=weight)
    line = simulate(order("zero-bubble", stages, 1, batches), times)
    bubble = (stages - 1) * (forward + backward - 2 * weight)
    assert line.makespan_s == pytest.approx(batches * (forward + backward) + bubble)


def test_a_message_that_flows_beside_the_passes_delays_only_the_first_and_the_last():
    rows = order("1f1b", 2, 1, 8)
    free = PipelineTimes.even(2, forward_s=1.0, backward_s=2.0)
    late = PipelineTimes.even(2, forward_s=1.0, backward_s=2.0, hop=Hop(0.5))
    ahead = order("1f1b", 2, 1, 8, extra_warmup=(1, 0))
    assert simulate(rows, free).makespan_s == pytest.approx(27.0)
    # Without more warm-up each round trip waits; with one more micro-batch ahead, once each way.
    assert simulate(rows, late).makespan_s > 29.0
    assert simulate(ahead, late).makespan_s == pytest.approx(28.0)


def test_a_blocking_message_holds_up_both_ends():
    times = PipelineTimes.even(2, forward_s=1.0, backward_s=2.0, hop=Hop.blocking(0.5))
    line = simulate(order("1f1b", 2, 1, 4), times)
    assert line.blocked_s == pytest.approx((4.0, 4.0))
    assert line.makespan_s >= 4 * (3.0 + 1.0)


def test_an_activation_sent_late_waits_for_the_gradient_that_is_due():
    rows = order("1f1b", 2, 1, 8)
    times = PipelineTimes.even(2, forward_s=1.0, backward_s=2.0, hop=Hop(0.5))
    # Each of the seven rounds behind the first is 4.5 s long: the gradient's way to stage 0, the
    # activation's way to stage 1, and both passes there.
    late = simulate(rows, times, late_sends=True)
    assert late.makespan_s == pytest.approx(1.0 + 0.5 + 8 * 3.0 + 7 * 1.0 + 0.5 + 2.0)
    assert simulate(rows, times).makespan_s < late.makespan_s


@settings(max_examples=40, deadline=None)
@given(_cases())
def test_sending_late_ends_and_is_never_faster(case):
    rows, times = case
    late = simulate(rows, times, late_sends=True)
    assert late.makespan_s >= simulate(rows, times).makespan_s - 1e-9


def test_a_slow_link_sets_the_pace():
    times = PipelineTimes.even(2, forward_s=1.0, backward_s=1.0, hop=Hop(10.0))
    line = simulate(order("gpipe", 2, 1, 6), times)
    # The first forward, six messages, the last forward and first backward, six back, one backward.
    assert line.makespan_s == pytest.approx(1 + 60 + 1 + 1 + 60 + 1)


def test_the_numbers_of_a_stage_are_told_apart():
    times = PipelineTimes.even(2, forward_s=1.0, backward_s=2.0, hop=Hop(0.25, 0.5))
    line = simulate(order("1f1b", 2, 1, 3), times)
    assert line.busy_s == pytest.approx((9.0, 9.0))
    assert line.blocked_s == pytest.approx((1.5, 1.5))
    assert line.sending_s == pytest.approx((2.25, 2.25))
    assert line.stored_peak == (2, 1)
    assert line.last_backward_s(0, 0) == line.makespan_s


def test_an_order_that_does_not_fit_is_refused():
    times = PipelineTimes.even(2, forward_s=1.0, backward_s=2.0)
    with pytest.raises(ConfigError, match="an order of 3 stages, times of 2"):
        simulate(order("1f1b", 3, 1, 4), times)
    with pytest.raises(ConfigError, match="stage 0 of the order has 2 chunks, the times have 1"):
        simulate(order("interleaved", 2, 2, 4), times)
    rows = order("1f1b", 2, 1, 2)
    with pytest.raises(ConfigError, match="stage 1 lacks B1"):
        simulate((rows[0], rows[1][:-1]), times)


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ({"forward_s": -1.0, "backward_s": 2.0}, "forward -1.0 s"),
        ({"forward_s": 1.0, "backward_s": 2.0, "weight_s": 2.5}, "weight half 2.5 s"),
        ({"forward_s": float("nan"), "backward_s": 2.0}, "forward nan s"),
        ({"forward_s": 1.0, "backward_s": 2.0, "hop": Hop(-0.5)}, "a hop takes"),
    ],
)
def test_seconds_that_cannot_be_are_refused(seconds, message):
    with pytest.raises(ConfigError, match=message):
        PipelineTimes.even(2, **seconds)


def test_a_pipeline_of_no_time_has_no_bubble():
    times = PipelineTimes.even(2, forward_s=0.0, backward_s=0.0)
    assert simulate(order("1f1b", 2, 1, 2), times).bubble == 0.0


def test_a_backward_of_weights_only_may_be_rounded():
    times = PipelineTimes.even(2, forward_s=1.0, backward_s=2.0, weight_s=2.0 + 1e-12)
    line = simulate(order("zero-bubble", 2, 1, 3), times)
    for starts, ends in zip(line.starts_s, line.ends_s, strict=True):
        assert all(start <= end for start, end in zip(starts, ends, strict=True))
