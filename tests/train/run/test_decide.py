"""The supervisor's decisions: one test a rule, then properties over any row of events."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mxn.train.run.supervise import words as w
from mxn.train.run.supervise.decide import begin, decide

POLICY = w.Policy(max_restarts=4, backoff_s=1, max_backoff_s=5, drop_after=2, grow_every_s=10)


class Run:
    """A state with what was ordered on the way."""

    def __init__(self, *groups: str, policy: w.Policy = POLICY) -> None:
        self.policy = policy
        self.state, self.orders = begin(groups)

    def __call__(self, event: w.Event, now_s: float = 0.0) -> tuple[w.Order, ...]:
        self.state, self.orders = decide(self.state, event, now_s, self.policy)
        self.state.validate()
        return tuple(order for order in self.orders if not isinstance(order, w.Say))

    def start(self) -> Run:
        self(w.Planned(self.state.active))
        assert self(w.GatePassed()) == (w.Launch(self.state.launch),)
        return self


def test_a_job_is_planned_checked_and_launched():
    run = Run("a", "b")
    assert run.orders == (w.MakePlan(("a", "b")),)
    assert run(w.Planned(("a", "b"))) == (w.RunGate(),)
    assert run(w.GatePassed()) == (w.Launch(1),)
    assert run(w.RanksEnded(is_finished=True)) == ()
    assert run.state.phase == "done"


def test_a_death_restarts_all_ranks_after_a_pause_that_doubles():
    run = Run("a", policy=w.Policy(backoff_s=1, max_backoff_s=3, drop_after=99)).start()
    waits = []
    for _ in range(4):
        assert run(w.RankDied("a", "killed"), 100.0) == (w.KillRanks(),)
        waits.append(run.state.resume_at_s - 100)
        assert run(w.Tick(), run.state.resume_at_s - 0.01) == ()
        assert run(w.Tick(), run.state.resume_at_s) == (w.Launch(run.state.launch),)
    assert waits == [1, 2, 3, 3]
    assert run.state.launch == 5


def test_a_new_checkpoint_forgets_the_restarts_and_an_old_one_does_not():
    run = Run("a", "b").start()
    run(w.Saved(10))
    run(w.RankDied("a", "killed"))
    run(w.Tick(), 99)
    run(w.Saved(10))
    assert (run.state.restarts, run.state.failures) == (1, {"a": 1})
    run(w.Saved(20))
    assert (run.state.restarts, run.state.failures) == (0, {})


def test_restarts_are_limited():
    run = Run("a").start()
    for _ in range(POLICY.max_restarts):
        run(w.RankDied("a", "killed"))
        run(w.Tick(), 999)
    assert run(w.RankDied("a", "killed")) == (w.KillRanks(),)
    assert run.state.phase == "failed"
    assert "4 restarts without a new checkpoint; last: killed" in run.state.reason


def test_wrong_input_is_not_tried_again():
    run = Run("a").start()
    assert run(w.RankDied("a", "no such column", is_users=True)) == (w.KillRanks(),)
    assert run.state.phase == "failed"


def test_a_group_that_fails_again_and_again_is_dropped_and_the_rest_goes_on():
    run = Run("a", "b").start()
    run(w.RankDied("b", "device error"))
    run(w.Tick(), 99)
    assert run(w.RankDied("b", "device error")) == (w.KillRanks(), w.MakePlan(("a",)))
    assert run.state.dropped["b"].reason == "failed 2 times in a row, last: device error"
    assert run.start().state.phase == "running"


def test_the_last_group_is_never_dropped():
    run = Run("a", "b").start()
    run(w.DropAsked("b"))
    assert run(w.DropAsked("a")) == ()
    assert run.state.active == ("a",)


def test_a_drop_lets_the_ranks_write_first_and_then_plans():
    run = Run("a", "b").start()
    assert run(w.DropAsked("a")) == (w.PauseRanks(),)
    assert run(w.RanksEnded(is_finished=False)) == (w.MakePlan(("b",)),)


def test_a_death_while_pausing_goes_to_the_plan_at_once():
    run = Run("a", "b").start()
    run(w.DropAsked("a"))
    assert run(w.RankDied("a", "gone")) == (w.KillRanks(), w.MakePlan(("b",)))


def test_a_group_that_answers_is_taken_back_later_each_time():
    run = Run("a", "b", policy=w.Policy(drop_after=1, grow_every_s=10)).start()
    run(w.RankDied("b", "device error"), 0)
    run.start()
    assert run(w.Answered("b"), 9) == ()
    assert run(w.Answered("b"), 10) == (w.PauseRanks(),)
    assert run(w.RanksEnded(is_finished=False), 11) == (w.MakePlan(("a", "b")),)
    run.start()
    run(w.RankDied("b", "device error"), 20)
    assert run.state.dropped["b"].back_after_s == 40


def test_a_group_dropped_by_word_comes_back_by_word_only():
    run = Run("a", "b").start()
    run(w.DropAsked("b"))
    run(w.RanksEnded(is_finished=False))
    run.start()
    assert run(w.Answered("b"), 1e9) == ()
    assert run(w.GrowAsked("b")) == (w.PauseRanks(),)


def test_what_is_left_may_be_too_small_and_waits_for_the_rest():
    run = Run("a", "b", policy=w.Policy(drop_after=1)).start()
    run(w.RankDied("b", "gone"), 0)
    run(w.PlanFailed(("a",), "needs 3 GiB, has 2", is_capacity=True))
    assert run.state.phase == "starved"
    assert run(w.Answered("b"), 1e6) == (w.MakePlan(("a", "b")),)


def test_a_job_that_never_fitted_fails():
    run = Run("a", "b")
    run(w.PlanFailed(("a", "b"), "needs 3 GiB, has 2", is_capacity=True))
    assert (run.state.phase, run.state.reason) == ("failed", "needs 3 GiB, has 2")


def test_a_gate_that_fails_ends_the_job():
    run = Run("a", "b")
    run(w.Planned(("a", "b")))
    run(w.GateFailed("softmax on b"))
    assert (run.state.phase, run.state.reason) == ("failed", "softmax on b")


def test_a_chip_that_lies_is_planned_for_once_or_ends_the_job():
    run = Run("a", "b")
    run(w.Planned(("a", "b")))
    assert run(w.SpeedOff("x", "3 times slower")) == (w.MakePlan(("a", "b")),)
    run(w.Planned(("a", "b")))
    assert run(w.SpeedOff("x", "2 times slower")) == (w.Launch(1),)
    strict = Run("a", policy=w.Policy(replans_on_lie=False))
    strict(w.Planned(("a",)))
    strict(w.SpeedOff("x", "3 times slower"))
    assert strict.state.phase == "failed"


def test_ctrl_c_writes_a_last_checkpoint_and_a_second_one_does_not_wait():
    run = Run("a").start()
    assert run(w.StopAsked()) == (w.PauseRanks(),)
    assert run(w.StopAsked()) == (w.KillRanks(),)
    assert run.state.phase == "stopped"


def test_a_plan_for_groups_that_are_gone_is_not_used():
    run = Run("a", "b")
    run(w.DropAsked("b"))
    assert run(w.Planned(("a", "b"))) == ()
    assert run(w.Planned(("a",))) == (w.RunGate(),)


def test_two_groups_that_come_back_at_once_are_judged_by_the_plan_with_both():
    run = Run("a", "b", "c", policy=w.Policy(drop_after=1))
    run.start()(w.RankDied("b", "gone"), 0)
    run.start()(w.RankDied("c", "gone"), 0)
    run(w.PlanFailed(("a",), "needs 3 GiB, has 1", is_capacity=True))
    assert run(w.GrowAsked("b"), 1) == (w.MakePlan(("a", "b")),)
    assert run(w.GrowAsked("c"), 1) == (w.MakePlan(("a", "b", "c")),)
    assert run(w.PlanFailed(("a", "b"), "needs 3 GiB, has 2", is_capacity=True)) == ()
    assert run(w.PlanFailed(("a", "b"), "b is slow", is_capacity=False)) == ()
    assert run(w.Planned(("a", "b", "c"))) == (w.RunGate(),)


def back(*groups: str, now_s: float = 50.0) -> Run:
    """Ranks of a and b ran, c was dropped; then `groups` were taken back."""
    run = Run("a", "b", "c", policy=w.Policy(drop_after=1, grow_every_s=10)).start()
    run(w.RankDied("c", "gone"), 0)
    run.start()
    for group in groups:
        run(w.GrowAsked(group), now_s)
    assert run(w.RanksEnded(is_finished=False), now_s) == (w.MakePlan(run.state.active),)
    return run


@pytest.mark.parametrize("is_capacity", [False, True])
def test_a_group_without_a_plan_is_dropped_again_and_the_rest_goes_on(is_capacity):
    run = back("c")
    gone = w.PlanFailed(("a", "b", "c"), "no device 'cuda:1'", is_capacity=is_capacity)
    assert run(gone, 60) == (w.MakePlan(("a", "b")),)
    assert run.state.dropped["c"].back_after_s == 80  # 10 s the first time, 20 s now
    assert "no device 'cuda:1'" in run.state.dropped["c"].reason
    assert run.start().state.phase == "running"


def test_a_group_that_came_back_starves_nobody_while_another_is_gone():
    run = back("c")
    run(w.DropAsked("b"))
    gone = w.PlanFailed(("a", "c"), "no two free cores", is_capacity=True)
    assert run(gone, 60) == (w.MakePlan(("a",)),)
    assert set(run.state.dropped) == {"b", "c"}


def test_a_group_that_the_gate_refuses_is_dropped_again_and_the_rest_goes_on():
    run = back("c")
    run(w.Planned(("a", "b", "c")))
    assert run(w.GateFailed("softmax on c"), 60) == (w.MakePlan(("a", "b")),)
    assert run.start().state.active == ("a", "b")


def test_a_plan_that_fails_without_a_group_that_came_back_ends_the_job():
    run = back("c")
    run(w.PlanFailed(("a", "b", "c"), "no such plan file", is_capacity=False))
    run(w.PlanFailed(("a", "b"), "no such plan file", is_capacity=False))
    assert (run.state.phase, run.state.reason) == ("failed", "no such plan file")


def test_a_group_that_ran_again_is_an_old_one():
    run = back("c").start()
    run(w.DropAsked("a"))
    run(w.RanksEnded(is_finished=False))
    run(w.PlanFailed(("b", "c"), "no profile", is_capacity=False))
    assert run.state.phase == "failed"


def test_what_is_left_and_came_back_is_not_dropped_to_the_last():
    run = back("c")
    run(w.DropAsked("a"))
    run(w.DropAsked("b"))
    run(w.PlanFailed(("c",), "no device 'cuda:1'", is_capacity=False))
    assert run.state.phase == "failed"


GROUPS = ("a", "b", "c")
names = st.sampled_from(GROUPS)


class Supervision(RuleBasedStateMachine):
    """Any events in any order, with a shell that does what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.ranks_run = False
        self.planned: tuple[str, ...] | None = None
        self.asked: tuple[str, ...] | None = None  # for which groups a plan was ordered last
        self.state, orders = begin(GROUPS)
        self.obey(orders)

    def send(self, event: w.Event) -> None:
        before = self.state
        self.state, orders = decide(self.state, event, self.now, POLICY)
        if before.phase in w.FINAL:
            assert (self.state, orders) == (before, ())
        self.obey(orders)

    def obey(self, orders: tuple[w.Order, ...]) -> None:
        for order in orders:
            match order:
                case w.KillRanks():
                    self.ranks_run = False
                case w.PauseRanks():
                    assert self.ranks_run, "nobody there to be paused"
                case w.Launch():
                    assert not self.ranks_run, "two launches at once"
                    assert self.planned == self.state.active, "launched by an old plan"
                    self.ranks_run = True
                case w.MakePlan(groups):
                    assert not self.ranks_run, "planned while ranks run"
                    assert groups == self.state.active
                    self.planned, self.asked = None, groups

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.send(w.Tick())

    @rule(kind=st.sampled_from(["planned", "capacity", "failed"]))
    def plan_comes(self, kind: str) -> None:
        if self.state.phase == "planning":
            before, groups = self.state, self.state.active
            self.planned = groups if kind == "planned" else None
            failed = w.PlanFailed(groups, "no room", is_capacity=kind == "capacity")
            self.send(w.Planned(groups) if kind == "planned" else failed)
            if kind != "planned":
                self.is_right_without_plan(before)

    @rule(groups=st.sets(names, min_size=1), is_capacity=st.booleans())
    def outdated_plan_comes(self, groups: set[str], is_capacity: bool) -> None:
        ordered = tuple(group for group in GROUPS if group in groups)
        for event in (w.Planned(ordered), w.PlanFailed(ordered, "no room", is_capacity)):
            if ordered != self.state.active:
                assert decide(self.state, event, self.now, POLICY) == (self.state, ())

    def is_right_without_plan(self, before: w.State) -> None:
        """What ran before goes on, whatever is wrong with those that came back."""
        old = [group for group in before.active if group not in before.regrown]
        if before.regrown and old:
            assert self.state.phase == "planning"
        if self.state.phase == "planning":
            assert self.state.active == tuple(old)
            again = [self.state.dropped[group] for group in before.regrown]
            assert all(gone.back_after_s > self.now for gone in again)

    @rule(event=st.sampled_from([w.GatePassed(), w.GateFailed("op"), w.SpeedOff("x", "slow")]))
    def gate_answers(self, event: w.Event) -> None:
        self.send(event)

    @precondition(lambda self: self.ranks_run)
    @rule(group=names | st.none(), is_users=st.sampled_from([False] * 9 + [True]))
    def rank_dies(self, group: str | None, is_users: bool) -> None:
        self.send(w.RankDied(group, "killed", is_users))
        assert not self.ranks_run

    @precondition(lambda self: self.ranks_run)
    @rule(is_finished=st.booleans())
    def ranks_end(self, is_finished: bool) -> None:
        self.ranks_run = False
        self.send(w.RanksEnded(is_finished))

    @precondition(lambda self: self.ranks_run)
    @rule()
    def checkpoint_is_written(self) -> None:
        self.send(w.Saved(self.state.checkpoint_step + 5))

    @rule(group=names, event=st.sampled_from([w.DropAsked, w.GrowAsked, w.Answered]))
    def group_changes(self, group: str, event: type) -> None:
        self.send(event(group))

    @rule()
    def somebody_stops_it(self) -> None:
        self.send(w.StopAsked())

    @invariant()
    def it_makes_sense(self) -> None:
        self.state.validate()
        if self.state.phase == "planning":
            assert self.asked == self.state.active, "waits for a plan that nobody makes"
        assert self.ranks_run == (self.state.phase in w.WITH_RANKS)
        assert self.state.restarts <= POLICY.max_restarts + (self.state.phase == "failed")
        if self.state.phase == "backing_off":
            assert self.state.resume_at_s - self.now <= POLICY.max_backoff_s


TestSupervision = Supervision.TestCase
TestSupervision.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
