"""The router's pure parts: health, breaker, affinity, policy, seam."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.engine.protocol import Delta, Generate, SamplingParams
from mxn.errors import InternalError
from mxn.serve.routing.affinity import Affinity, blocks, chain
from mxn.serve.routing.breaker import Breaker, BreakerRules
from mxn.serve.routing.health import Health, HealthRules
from mxn.serve.routing.policy import Load, PolicyRules, choose
from mxn.serve.routing.seam import Seam
from mxn.serve.routing.speed import Speed

RULES = HealthRules(down_after=2, up_after=2, hold_s=1, max_hold_s=20, half_life_s=100)


def fall_and_wait(health: Health, now_s: float) -> float:
    """Take it down, then report good results until it is up; return when that was."""
    health.bad(now_s)
    health.bad(now_s)
    assert not health.is_up
    while not health.good(now_s):
        now_s += 0.1
    return now_s


def test_one_bad_result_is_no_illness_and_one_good_one_no_cure() -> None:
    health = Health(RULES)
    assert not health.bad(0)
    assert health.is_up
    health.good(0)
    assert not health.bad(0)
    assert health.bad(0)
    assert not health.good(9)
    assert health.good(9)


def test_a_replica_that_is_gone_falls_at_once() -> None:
    health = Health(RULES)
    assert health.bad(0, is_fatal=True)


def test_the_hold_down_grows_with_each_flap_and_is_forgotten() -> None:
    health, now_s, holds = Health(RULES), 0.0, []
    for _ in range(6):
        up_s = fall_and_wait(health, now_s)
        holds.append(up_s - now_s)
        now_s = up_s
    assert holds == sorted(holds)
    assert holds[0] == pytest.approx(1, abs=0.2)
    assert holds[3] == pytest.approx(8, abs=1.5)
    assert holds[5] == pytest.approx(20, rel=0.05), "bounded"
    now_s += 1000
    assert fall_and_wait(health, now_s) - now_s < 1.2


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 5)), max_size=200))
def test_health_never_rises_before_its_hold_is_over(events: list[tuple[bool, float]]) -> None:
    health, now_s, goods = Health(RULES), 0.0, 0
    for is_good, pause_s in events:
        now_s += pause_s
        was_up = health.is_up
        changed = health.good(now_s) if is_good else health.bad(now_s)
        goods = goods + 1 if is_good else 0
        assert changed == (health.is_up != was_up)
        if health.is_up and not was_up:
            assert now_s >= health.held_until_s
            assert goods >= RULES.up_after
        assert health.held_until_s <= now_s + RULES.max_hold_s


def test_a_breaker_opens_lets_one_probe_through_and_closes() -> None:
    breaker = Breaker(BreakerRules(open_after=2, open_s=2, max_open_s=5))
    for _ in range(2):
        assert breaker.allows(0)
        breaker.sent(0)
        breaker.failed(0)
    assert not breaker.allows(1.9)
    assert breaker.allows(2)
    breaker.sent(2)
    assert not breaker.allows(2), "one probe at a time"
    breaker.failed(3)
    assert not breaker.allows(6.9), "twice as long"
    assert breaker.allows(7)
    breaker.sent(7)
    breaker.abandoned()
    assert breaker.allows(7), "its client left: another may try"
    breaker.sent(7)
    breaker.succeeded()
    assert breaker.state == "closed"


@given(st.lists(st.sampled_from(["send", "fail", "work", "leave", "wait"]), max_size=200))
def test_a_half_open_breaker_has_at_most_one_probe_out(events: list[str]) -> None:
    breaker, now_s, out = Breaker(), 0.0, 0
    for event in events:
        if event == "wait":
            now_s += 1.0
        elif event == "send":
            if breaker.allows(now_s):
                breaker.sent(now_s)
                out += 1
                if breaker.state == "half_open":
                    assert not breaker.allows(now_s)
        elif out:
            out -= 1
            if event == "fail":
                breaker.failed(now_s)
            elif event == "work":
                breaker.succeeded()
            else:
                breaker.abandoned()
        assert breaker.allows(now_s + 60) or breaker.state == "half_open", "never shut for good"


@given(st.integers(0, 20_000))
def test_blocks_cover_a_prompt_without_gaps(num_tokens: int) -> None:
    end = 0
    for begin, stop in blocks(num_tokens):
        assert begin == end
        end = stop
    assert num_tokens - 256 < end <= num_tokens


def test_a_long_prompt_costs_few_hashes() -> None:
    assert len(chain(range(100_000))) < 500


@given(st.lists(st.integers(0, 50_000), min_size=16, max_size=600), st.integers(0, 600))
def test_affinity_finds_the_shared_beginning(ids: list[int], cut: int) -> None:
    affinity = Affinity()
    affinity.note(chain(ids), "a")
    cut = min(cut, len(ids))
    other = [*ids[:cut], 99_999, *ids[cut:]]
    matched = affinity.match(chain(other)).get("a", 0)
    assert matched == max((end for _, end in blocks(cut)), default=0)
    assert affinity.match(chain(ids, "adapter")) == {}


def test_affinity_is_bounded_forgets_the_oldest_and_those_who_are_gone() -> None:
    affinity = Affinity(capacity=10, replicas_each=2)
    for first in range(5):
        affinity.note(chain([first] * 64), "a")
    assert len(affinity) == 10
    assert affinity.match(chain([4] * 64)) == {"a": 64}
    assert affinity.match(chain([0] * 64)) == {}
    assert affinity.match(chain([2] * 64)) == {"a": 32}, "a prompt loses its end first"
    for name in "bcd":
        affinity.note(chain([4] * 64), name)
    assert set(affinity.match(chain([4] * 64))) == {"c", "d"}
    affinity.forget("d")
    assert set(affinity.match(chain([4] * 64))) == {"c"}


def pick(*loads: Load, prompt_tokens: int = 100, **rules: float) -> str:
    return choose(loads, prompt_tokens, PolicyRules(**rules)).replica


def test_policy_takes_the_least_loaded_for_its_weight() -> None:
    assert pick(Load(replica="a", in_flight=3), Load(replica="b", in_flight=2)) == "b"
    assert pick(Load(replica="a", in_flight=3, weight=4), Load(replica="b", in_flight=2)) == "a"


def test_a_kept_prefix_draws_until_the_load_is_too_uneven() -> None:
    other = Load(replica="b")
    assert pick(Load(replica="a", matched_tokens=96, in_flight=1), other) == "a"
    assert pick(Load(replica="a", matched_tokens=96, in_flight=9), other) == "b"
    choice = choose([Load(replica="a", matched_tokens=96), other], 100, PolicyRules())
    assert choice.reason == "prefix 96 of 100 tokens"
    assert "prefix -1.92" in choice.explain()


def test_cost_pages_and_the_latency_target_count() -> None:
    assert pick(Load(replica="a", cost=2.0), Load(replica="b", cost=1.0)) == "b"
    assert pick(Load(replica="a", cost=2.0), Load(replica="b", cost=1.0, in_flight=3)) == "a"
    assert pick(Load(replica="a", kv_used=0.95), Load(replica="b", in_flight=1)) == "b"
    slow, quick = Load(replica="a", first_token_s=2.0), Load(replica="b", first_token_s=0.1)
    assert pick(slow, quick) == "a"
    assert pick(slow, quick, target_first_token_s=0.5) == "b"


loads = st.builds(
    Load, replica=st.text(min_size=1), weight=st.floats(0, 1e6), in_flight=st.floats(0, 1e4),
    share=st.floats(0, 1e6), kv_used=st.floats(0, 1), matched_tokens=st.integers(0, 10**6),
    cost=st.none() | st.floats(0, 100),
)  # fmt: skip


@given(st.lists(loads, min_size=1, max_size=8), st.integers(0, 10**6))
def test_policy_always_chooses_one_of_the_candidates(items: list[Load], tokens: int) -> None:
    choice = choose(items, tokens, PolicyRules())
    assert choice.replica in {item.replica for item in items}
    assert choice.reason
    assert choice.explain()


@given(st.floats(0, 8), st.floats(0.0001, 0.01), st.integers(1, 64))
def test_the_fit_finds_how_a_gap_grows_with_load(part: float, each: float, at: int) -> None:
    speed, fixed = Speed(), part * each
    for step in range(40):
        load = 1 + step % 20
        gap = fixed + each * load
        speed.tokens(step * 0.1, gap * 10, 10, 10, load)
    expected = fixed + each * at
    assert speed.gap_at(at) == pytest.approx(expected, rel=0.25)


text = st.text(alphabet="ab", max_size=4)


@settings(max_examples=200)
@given(st.lists(text, min_size=1, max_size=12), st.data())
def test_a_seam_joins_text_that_is_cut_anywhere(pieces: list[str], data: st.DataObject) -> None:
    """Replicas release the same text in pieces of their own; each may be lost at any piece."""
    whole = "".join(pieces)
    seam = Seam(Generate(request_id="q", prompt_ids=[1], sampling=SamplingParams()))
    got, moves = "", data.draw(st.integers(0, 3))
    for move in range(moves + 1):
        if move:
            seam.move()
        is_last = move == moves
        # A new replica says at least what counts as released at the tokens so far, in any pieces.
        cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4)))
        bounds = [0, *cuts, len(whole)]
        spans = list(pairwise(bounds))
        for number, (begin, end) in enumerate(spans):
            is_end = is_last and number == len(spans) - 1
            if not is_last and number == len(spans) - 1:
                break
            delta = Delta(
                request_id="x", text=whole[begin:end], finish_reason="stop" if is_end else None
            )
            joined = seam.take(delta)
            got += joined.text if joined else ""
    assert got == whole


def test_a_replica_that_says_something_else_is_no_continuation() -> None:
    seam = Seam(Generate(request_id="q", prompt_ids=[1], sampling=SamplingParams()))
    seam.take(Delta(request_id="q", text="abc", token_ids=[1]))
    assert seam.move().resume_ids == [1]
    with pytest.raises(InternalError, match="something else"):
        seam.take(Delta(request_id="q~1", text="abd", completion_tokens=1))
    seam.move()
    with pytest.raises(InternalError, match="ended 1 characters"):
        seam.take(Delta(request_id="q~2", text="ab", finish_reason="stop", completion_tokens=1))


def test_a_replica_that_begins_anew_is_noticed() -> None:
    seam = Seam(Generate(request_id="q", prompt_ids=[1], sampling=SamplingParams()))
    seam.take(Delta(request_id="q", text="ab", token_ids=[1, 2], completion_tokens=2))
    seam.move()
    with pytest.raises(InternalError, match="cannot resume"):
        seam.take(Delta(request_id="q~1", text="ab", token_ids=[1], completion_tokens=1))
