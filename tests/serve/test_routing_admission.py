"""The fair queue: shares by weight, no starvation, bounds, in fake time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.errors import OverloadedError
from mxn.serve.routing.admission import Admission, AdmissionRules, Chips, Entry


def anywhere(target: Chips) -> bool:
    return True


def serve(
    admission: Admission, tenants: dict[str, tuple[float, int]], rounds: int, seed: int = 0
) -> dict[str, float]:
    """Keep every tenant busy; return the tokens each got. One request runs at a time."""
    rng = random.Random(seed)
    got = dict.fromkeys(tenants, 0.0)
    waiting = dict.fromkeys(tenants, 0)
    for now in range(rounds):
        for name, (weight, priority) in tenants.items():
            while waiting[name] < 3:
                cost = rng.randint(1, 100)
                entry = Entry(tenant=name, cost=cost, weight=weight, priority=priority)
                admission.wait(entry, now)
                waiting[name] += 1
        entry = admission.next(anywhere)
        assert entry is not None
        waiting[entry.tenant] -= 1
        actual = rng.uniform(0.2, 1.0) * entry.cost  # requests end before their limit
        got[entry.tenant] += actual
        admission.ended(entry, actual, now)
        admission.validate()
    return got


def test_two_busy_tenants_of_weight_1_and_2_get_1_to_2() -> None:
    got = serve(Admission(), {"a": (1, 0), "b": (2, 0)}, 3000)
    assert got["b"] / got["a"] == pytest.approx(2, rel=0.03)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5), st.integers(0, 1000))
def test_busy_tenants_get_what_their_weights_say(weights: list[float], seed: int) -> None:
    tenants = {f"t{at}": (weight, 0) for at, weight in enumerate(weights)}
    got = serve(Admission(), tenants, 600, seed)
    per_weight = [got[name] / weight for name, (weight, _) in tenants.items()]
    # Nobody is ever further ahead than a couple of requests.
    assert max(per_weight) - min(per_weight) <= 3 * 100 / min(weights)


def test_low_priority_is_slow_and_does_not_starve() -> None:
    got = serve(Admission(), {"live": (1, 0), "batch": (1, 6)}, 3000)
    assert got["live"] / got["batch"] == pytest.approx(8, rel=0.1)


def test_a_tenant_that_was_alone_is_not_punished_and_a_new_one_is_served_in_turn() -> None:
    admission = Admission()
    for now in range(100):
        entry = Entry(tenant="a", cost=50)
        admission.admit(entry)
        admission.ended(entry, 50, now)
    for _ in range(20):
        admission.wait(Entry(tenant="a", cost=50), 100)
    for _ in range(3):
        admission.wait(Entry(tenant="b", cost=50), 100)
    order = [entry.tenant for _ in range(6) if (entry := admission.next(anywhere))]
    assert order.count("a") == order.count("b") == 3


def test_a_full_queue_drops_what_the_greedy_tenant_added_last() -> None:
    admission = Admission(AdmissionRules(max_waiting=4))
    greedy = [Entry(tenant="a", cost=1) for _ in range(4)]
    for entry in greedy:
        assert admission.wait(entry, 0) is None
    with pytest.raises(OverloadedError) as caught:
        admission.wait(Entry(tenant="a", cost=1), 0)
    assert caught.value.retry_after_s >= 1
    assert admission.wait(Entry(tenant="b", cost=1), 0) is greedy[-1]
    admission.validate()


def test_retry_after_follows_the_measured_rate() -> None:
    admission = Admission()
    for at in range(50):
        entry = Entry(tenant="a", cost=1)
        admission.admit(entry)
        admission.ended(entry, 1, 0.5 * at)
    for _ in range(19):
        admission.wait(Entry(tenant="a", cost=1), 25)
    assert admission.retry_after_s() == pytest.approx(10, rel=0.1)


def test_deadlines_are_found() -> None:
    admission = Admission(AdmissionRules(max_wait_s=10))
    early, late = Entry(tenant="a", cost=1, deadline_s=3), Entry(tenant="b", cost=1)
    admission.wait(early, 0)
    admission.wait(late, 0)
    assert admission.expired(2.9) == []
    assert admission.expired(3) == [early]
    assert admission.expired(10) == [late]
    assert len(admission) == 0


def test_a_request_for_a_full_chip_holds_nobody_up() -> None:
    admission = Admission()
    pinned = Entry(tenant="a", cost=1, target=frozenset({"full"}))
    free = Entry(tenant="a", cost=1)
    admission.wait(pinned, 0)
    admission.wait(free, 0)
    assert admission.next(lambda target: target is None) is free
    assert admission.next(lambda target: target is None) is None
    assert admission.next(anywhere) is pinned


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("wnree"), st.integers(0, 4)), max_size=120))
def test_nothing_is_lost_or_run_twice(events: list[tuple[str, int]]) -> None:
    admission = Admission(AdmissionRules(max_waiting=8, max_wait_s=5))
    waiting: list[Entry] = []
    running: list[Entry] = []
    for now, (event, which) in enumerate(events):
        if event == "w":
            entry = Entry(tenant=f"t{which % 3}", cost=which + 1, priority=which)
            try:
                victim = admission.wait(entry, now)
            except OverloadedError:
                continue
            if victim is not None:
                waiting.remove(victim)
            waiting.append(entry)
        elif event == "n":
            entry = admission.next(anywhere)
            assert (entry is None) == (not waiting)
            if entry is not None:
                waiting.remove(entry)
                running.append(entry)
        elif event == "r" and waiting:
            admission.remove(waiting.pop(which % len(waiting)))
        elif event == "e" and running:
            admission.ended(running.pop(), which, now)
        for entry in admission.expired(now):
            waiting.remove(entry)
        admission.validate()
        assert len(admission) == len(waiting)
