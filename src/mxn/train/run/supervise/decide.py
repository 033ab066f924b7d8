"""What a supervisor of a training job decides, as a pure state machine: events in, orders out.

No processes, no files, no clock: the time comes with the event. `shell.py` carries the orders out.
Start at `decide`; the phases are told in `words.py`.
"""

from __future__ import annotations

from dataclasses import replace

from mxn.train.run.supervise.words import (
    FINAL,
    WITH_RANKS,
    Answered,
    DropAsked,
    Dropped,
    Event,
    GateFailed,
    GatePassed,
    GrowAsked,
    KillRanks,
    Launch,
    MakePlan,
    Order,
    PauseRanks,
    PlanFailed,
    Planned,
    Policy,
    RankDied,
    RanksEnded,
    RunGate,
    Saved,
    Say,
    SpeedOff,
    State,
    StopAsked,
    Tick,
)

Decided = tuple[State, tuple[Order, ...]]


def begin(groups: tuple[str, ...], checkpoint_step: int = -1, launch: int = 0) -> Decided:
    """Return the first state of a job and its first order.

    `launch`: the last one of an earlier supervisor, whose files lie in the job's folder.
    """
    state = State(groups=groups, checkpoint_step=checkpoint_step, launch=launch)
    return state, (MakePlan(groups),)


def decide(state: State, event: Event, now_s: float, policy: Policy) -> Decided:
    """Return the next state and what is to be done. Events that mean nothing now change nothing."""
    if state.phase in FINAL:
        return state, ()
    match event:
        case Saved(step):
            return _saved(state, step), ()
        case StopAsked():
            return _stop(state)
        case RankDied():
            return _died(state, event, now_s, policy)
        case RanksEnded(is_finished):
            return _ended(state, is_finished)
        case DropAsked(group, reason):
            return _drop_asked(state, group, reason, now_s, policy)
        case GrowAsked(group):
            return _take_back(state, group)
        case Answered(group):
            return _answered(state, group, now_s, policy)
        case Tick():
            return _tick(state, now_s)
        case _:
            return _planned_or_checked(state, event, now_s, policy)


def _planned_or_checked(state: State, event: Event, now_s: float, policy: Policy) -> Decided:
    match state.phase, event:
        case "planning", Planned(groups) if groups == state.active:
            return replace(state, phase="checking"), (RunGate(),)
        case "planning", PlanFailed(groups, reason, is_capacity) if groups == state.active:
            if is_capacity and state.dropped and not _can_go_back(state):
                why = f"without {', '.join(state.dropped)}: {reason}"
                return replace(state, phase="starved", reason=why), (Say(why),)
            return _without_regrown(state, reason, now_s, policy)
        case "checking", GatePassed():
            return _launch(state)
        case "checking", GateFailed(reason):
            return _without_regrown(state, reason, now_s, policy)
        case "checking", SpeedOff(chip, reason):
            return _lied(state, chip, reason, policy)
        case _:
            return state, ()


def _can_go_back(state: State) -> bool:
    """Return whether some groups came back and others were there before them."""
    return 0 < len(state.regrown) < len(state.active)


def _without_regrown(state: State, reason: str, now_s: float, policy: Policy) -> Decided:
    """Go back to the groups that ranks ran on; the job fails where none came back since then."""
    if not _can_go_back(state):
        return replace(state, phase="failed", reason=reason), ()
    again = state.regrown
    for group in again:  # nobody knows which of several it was; the others will answer again
        state = _dropped(state, group, f"taken back in vain: {reason}", now_s, policy)
    say = Say(f"going on without {', '.join(again)}, taken back in vain: {reason}")
    return replace(state, phase="planning"), (say, MakePlan(state.active))


def _lied(state: State, chip: str, reason: str, policy: Policy) -> Decided:
    if not policy.replans_on_lie:
        return replace(state, phase="failed", reason=reason), ()
    if chip in state.lies:  # measured twice and still off: its speed is not steady
        text = f"{reason}; it was planned for already, going on"
        return _launch(state, Say(text))
    lies = state.lies | {chip}
    state = replace(state, phase="planning", lies=lies, reason=reason)
    return state, (Say(f"{reason}; planning again with what was measured"), MakePlan(state.active))


def _launch(state: State, *orders: Order) -> Decided:
    state = replace(state, phase="running", launch=state.launch + 1, reason="", regrown=())
    return state, (*orders, Launch(state.launch))


def _saved(state: State, step: int) -> State:
    if step <= state.checkpoint_step:
        return state
    return replace(state, checkpoint_step=step, restarts=0, failures={})


def _stop(state: State) -> Decided:
    if state.phase == "stopping":
        return replace(state, phase="stopped", reason="stopped at once"), (KillRanks(),)
    if state.phase in ("running", "pausing"):
        return replace(state, phase="stopping", reason="asked to stop"), (PauseRanks(),)
    return replace(state, phase="stopped", reason="asked to stop"), ()


def _ended(state: State, is_finished: bool) -> Decided:
    if state.phase not in WITH_RANKS:
        return state, ()
    if is_finished:
        return replace(state, phase="done", reason=""), ()
    if state.phase == "stopping":
        return replace(state, phase="stopped"), ()
    return replace(state, phase="planning"), (MakePlan(state.active),)


def _died(state: State, event: RankDied, now_s: float, policy: Policy) -> Decided:
    if state.phase not in WITH_RANKS:
        return state, ()
    if event.is_users:
        return replace(state, phase="failed", reason=event.reason), (KillRanks(),)
    if state.phase == "stopping":
        why = f"a rank died while stopping ({event.reason})"
        return replace(state, phase="stopped", reason=why), (KillRanks(),)
    failures = dict(state.failures)
    if event.group is not None:
        failures[event.group] = failures.get(event.group, 0) + 1
    restarts = state.restarts + 1
    was_pausing = state.phase == "pausing"
    state = replace(state, failures=failures, restarts=restarts, reason=event.reason)
    if event.group and failures[event.group] >= policy.drop_after and len(state.active) > 1:
        reason = f"failed {failures[event.group]} times in a row, last: {event.reason}"
        state = _dropped(state, event.group, reason, now_s, policy)
        say = Say(f"going on without group {event.group!r}: {reason}")
        state = replace(state, phase="planning", restarts=0)  # what is left starts afresh
        return state, (KillRanks(), say, MakePlan(state.active))
    if restarts > policy.max_restarts:
        why = f"{policy.max_restarts} restarts without a new checkpoint; last: {event.reason}"
        return replace(state, phase="failed", reason=why), (KillRanks(),)
    if was_pausing:  # it was about to be planned anew anyway
        return replace(state, phase="planning"), (KillRanks(), MakePlan(state.active))
    wait_s = min(policy.backoff_s * 2 ** (restarts - 1), policy.max_backoff_s)
    say = Say(f"{event.reason}; ranks start again in {wait_s:g} s ({restarts} in a row)")
    return replace(state, phase="backing_off", resume_at_s=now_s + wait_s), (KillRanks(), say)


def _dropped(state: State, group: str, reason: str, now_s: float, policy: Policy) -> State:
    """Each time a group is dropped it must be silent twice as long before it is believed again."""
    drops = dict(state.drops)
    drops[group] = drops.get(group, 0) + 1
    back = now_s + policy.grow_every_s * 2 ** (drops[group] - 1)
    failures = {name: count for name, count in state.failures.items() if name != group}
    dropped = {**state.dropped, group: Dropped(reason=reason, back_after_s=back)}
    regrown = tuple(name for name in state.regrown if name != group)
    return replace(state, dropped=dropped, drops=drops, failures=failures, regrown=regrown)


def _drop_asked(state: State, group: str, reason: str, now_s: float, policy: Policy) -> Decided:
    if group not in state.active:
        return state, (Say(f"no group {group!r} to drop; active: {', '.join(state.active)}"),)
    if len(state.active) == 1:
        return state, (Say(f"group {group!r} is the last one and stays"),)
    # Taken back by word only: whoever asked for it knows why.
    state = _dropped(state, group, reason, now_s, policy)
    kept = replace(state.dropped[group], back_after_s=float("inf"))
    return _plan_anew(replace(state, dropped={**state.dropped, group: kept}))


def _answered(state: State, group: str, now_s: float, policy: Policy) -> Decided:
    gone = state.dropped.get(group)
    if gone is None or not policy.grow or now_s < gone.back_after_s:
        return state, ()
    return _take_back(state, group)


def _take_back(state: State, group: str) -> Decided:
    if group not in state.dropped:
        return state, (Say(f"group {group!r} is not dropped"),)
    if state.phase == "stopping":
        return state, ()
    dropped = {name: gone for name, gone in state.dropped.items() if name != group}
    regrown = (*state.regrown, group)
    state, orders = _plan_anew(replace(state, dropped=dropped, regrown=regrown))
    return state, (Say(f"group {group!r} is back"), *orders)


def _plan_anew(state: State) -> Decided:
    """Let the ranks end at a checkpoint first, where there are ranks."""
    if state.phase == "running":
        return replace(state, phase="pausing", reason="another plan is to come"), (PauseRanks(),)
    if state.phase in ("pausing", "stopping"):
        return state, ()
    return replace(state, phase="planning"), (MakePlan(state.active),)


def _tick(state: State, now_s: float) -> Decided:
    if state.phase == "backing_off" and now_s >= state.resume_at_s:
        return _launch(state)
    return state, ()
