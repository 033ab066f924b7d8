"""Carries out what `decide.py` decides: the thin shell with processes, files, signals, the clock.

Planner, gate, launcher and probe are handed in (`needs.py`), so that it knows no planner and no
devices. Start at `Supervisor.run`. One supervisor holds a job's folders at a time.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mxn.errors import CapacityError, MxnError, UserError
from mxn.train.plan.plan import TrainPlan
from mxn.train.run import scratch
from mxn.train.run.checkpoint import find
from mxn.train.run.checkpoint import manifest as manifests
from mxn.train.run.control import Asked, Control, write_whole
from mxn.train.run.job import Job, metrics_path, status_path
from mxn.train.run.supervise import status
from mxn.train.run.supervise import words as w
from mxn.train.run.supervise.decide import begin, decide
from mxn.train.run.supervise.files import SignsOfLife, held_folders, last_launch, last_line
from mxn.train.run.supervise.interrupts import Interrupts
from mxn.train.run.supervise.needs import (
    GateError,
    Launch,
    MakePlan,
    NoPlaceError,
    RunGate,
    SpeedError,
    StartProbe,
    policy_of,
)
from mxn.train.run.supervise.probes import Probes
from mxn.train.run.supervise.ranks import Launching, Ranks, culprit, with_words

log = logging.getLogger("mxn.train")

__all__ = ["GateError", "SpeedError", "Supervisor"]

_POLL_S = 0.1
_GRACE_S = 2.0  # after a first death, for the others to say what they saw
_STATUS_S = 1.0


class Supervisor:
    """Runs one job to its end. `make_plan` raises CapacityError when the groups are too small."""

    def __init__(
        self,
        job: Job,
        groups: tuple[str, ...],
        *,
        make_plan: MakePlan,
        run_gate: RunGate,
        launch: Launch,
        start_probe: StartProbe | None = None,
        on_say: Callable[[str], None] | None = None,
    ) -> None:
        self.job, self.policy = job, policy_of(job)
        self.out = Path(job.out)
        self._make_plan, self._run_gate, self._launch = make_plan, run_gate, launch
        self._on_say = on_say
        self._probes: Probes | None = None
        if start_probe is not None and self.policy.grow:
            self._probes = Probes(job, start_probe, self.policy.grow_every_s)
        self.plan: TrainPlan | None = None
        self.ranks: Ranks | None = None
        self.said: deque[str] = deque(maxlen=20)
        self._events: deque[w.Event] = deque()
        self._first_death_s: float | None = None
        self._signs: SignsOfLife | None = None  # of the launch
        self._written_s = 0.0
        self._unwritten: set[str] = set()  # files that there was no room for
        self._interrupts = Interrupts()
        self._is_held = False
        self._asked: Asked | None = None
        self._groups = groups
        self.state = w.State(groups=groups)

    def run(self) -> w.State:
        """Return the last state: done, stopped or failed, and why.

        Raises: UserError when another supervisor holds the folder, or the checkpoint is broken.
        """
        with self.held(), self._interrupts.heard():
            scratch.sweep()
            Control(self.out, 0)
            self._asked = Asked(self.out)
            find(self._checkpoints, self.job.checkpoint.resume)
            self.state, orders = begin(self._groups, self._newest(), last_launch(self.out))
            try:
                self._obey(orders)
                while self.state.phase not in w.FINAL:
                    self._step()
            except KeyboardInterrupt:  # while no rank ran
                self.state, _ = decide(self.state, w.StopAsked(), time.monotonic(), self.policy)
            finally:
                if self.ranks is not None:
                    self.ranks.kill()
                self._write_status()
        return self.state

    def _step(self) -> None:
        if not self._events:
            self._look()
        events, self._events = self._events, deque()
        for event in events:
            self.state, orders = decide(self.state, event, time.monotonic(), self.policy)
            self._obey(orders)
        if not events:
            time.sleep(_POLL_S)
        if time.monotonic() - self._written_s > _STATUS_S or events:
            self._write_status()

    # -- orders ----------------------------------------------------------------------------------

    def _obey(self, orders: tuple[w.Order, ...]) -> None:
        for order in orders:
            match order:
                case w.MakePlan(groups):
                    self._forget_plans()
                    self._events.append(self._plan(groups))
                case w.RunGate():
                    self._events.append(self._gate())
                case w.Launch(number):
                    self._start(number)
                case w.PauseRanks():
                    Control(self.out, self.state.launch).ask_pause()
                case w.KillRanks():
                    self._kill()
                case w.Say(text):
                    self.say(text)

    def say(self, text: str) -> None:
        self.said.append(text)
        (self._on_say or log.warning)(text)

    def _forget_plans(self) -> None:
        """Of two plans in one look only the last is `self.plan`, and so only that one is told."""
        kept = (e for e in self._events if not isinstance(e, w.Planned | w.PlanFailed))
        self._events = deque(kept)

    def _plan(self, groups: tuple[str, ...]) -> w.Event:
        self._write_status()
        try:
            with self._interrupts.leaving_at_once():
                self.plan = self._make_plan(self.job, groups)
        except CapacityError as error:
            return w.PlanFailed(groups, str(error), is_capacity=True)
        except MxnError as error:
            return w.PlanFailed(groups, str(error), is_capacity=False)
        with self._without_room("plan.json"):
            write_whole(self.out / "plan.json", self.plan.to_json())
        return w.Planned(groups)

    def _gate(self) -> w.Event:
        assert self.plan is not None
        self._write_status()
        try:
            with self._interrupts.leaving_at_once():
                self._run_gate(self.job, self.plan)
        except SpeedError as error:
            return w.SpeedOff(error.chip, error.message)
        except MxnError as error:
            return w.GateFailed(str(error))
        return w.GatePassed()

    def _start(self, number: int) -> None:
        assert self.plan is not None
        # Broken ones: passed over only where the job says so, also in the middle of a run.
        chosen = "intact" if self.job.checkpoint.resume == "intact" else "newest"
        try:
            stored = find(self._checkpoints, chosen)
        except UserError as error:
            self._events.append(w.RankDied(None, str(error), is_users=True))
            return
        step = stored.manifest.position.step if stored else None
        self.state = replace(self.state, checkpoint_step=-1 if step is None else step)
        log_folder = self.out / "log" / f"launch-{number}"
        self._first_death_s = None
        self._signs = SignsOfLife(self.job, number)
        launching = Launching(
            job=self.job, plan=self.plan, launch=number, resume_step=step, log_folder=log_folder
        )
        try:
            log_folder.mkdir(parents=True, exist_ok=True)
            self.ranks = self._launch(launching)
        except (MxnError, OSError) as error:
            self._events.append(_not_started(error))

    def _kill(self) -> None:
        if self.ranks is not None:
            self.ranks.kill()
            self.ranks = None

    # -- what happens ----------------------------------------------------------------------------

    def _look(self) -> None:
        """Put what happened since the last look among the events."""
        if self._interrupts.take():
            self._events.append(w.StopAsked())
        self._hear()
        newest = self._newest()
        if newest > self.state.checkpoint_step:
            self._events.append(w.Saved(newest))
        if self.ranks is not None:
            self._watch(self.ranks)
        if self._probes is not None:
            answered = self._probes.answered(self.state.dropped, time.monotonic())
            self._events.extend(map(w.Answered, answered))
        if self.state.phase == "backing_off" and time.monotonic() >= self.state.resume_at_s:
            self._events.append(w.Tick())

    def _hear(self) -> None:
        assert self._asked is not None
        for asked in self._asked.new():
            match asked["action"]:
                case "drop":
                    self._events.append(w.DropAsked(asked["group"]))
                case "grow":
                    self._events.append(w.GrowAsked(asked["group"]))
                case "stop":
                    self._events.append(w.StopAsked())

    def _watch(self, ranks: Ranks) -> None:
        control = Control(self.out, self.state.launch)
        if deaths := ranks.deaths():
            now = time.monotonic()
            self._first_death_s = self._first_death_s or now
            if ranks.have_ended() or now - self._first_death_s > _GRACE_S:
                told = [with_words(death, control) for death in deaths]
                self._events.append(culprit(told))
        elif ranks.have_ended():
            self.ranks = None
            self._events.append(w.RanksEnded(control.is_finished()))
        elif self._signs is not None and self._signs.silent_s() > self.job.faults.stall_s:
            text = f"no step and no other sign of life for {self.job.faults.stall_s:g} s"
            self._events.append(w.RankDied(None, text))

    # -- files, signals --------------------------------------------------------------------------

    @property
    def _checkpoints(self) -> Path:
        return Path(self.job.checkpoint.folder)

    def _newest(self) -> int:
        return max((step for step, _ in manifests.complete(self._checkpoints)), default=-1)

    def _write_status(self) -> None:
        self._written_s = time.monotonic()
        with self._without_room("status.json"):
            status.write(
                status_path(self.job), self.job.name, self.state,
                self.plan.fingerprint if self.plan else None,
                last=last_line(metrics_path(self.job)), said=tuple(self.said),
            )  # fmt: skip

    @contextmanager
    def _without_room(self, name: str) -> Iterator[None]:
        """A full disk costs what the file tells, not the run; said once."""
        try:
            yield
        except OSError as error:
            if name not in self._unwritten:
                self._unwritten.add(name)
                self.say(f"{name} cannot be written, the job goes on: {error}")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the only one at work in the job's folders; `run` sees to it where its caller did not.

        Raises: UserError when another supervisor is, naming it.
        """
        if self._is_held:
            yield
            return
        with held_folders(self.job):
            self._is_held = True
            try:
                yield
            finally:
                self._is_held = False


def _not_started(error: MxnError | OSError) -> w.RankDied:
    """A machine or room on a disk may be there later; wrong input stays wrong."""
    group = error.group if isinstance(error, NoPlaceError) else None
    is_users = isinstance(error, UserError) and not isinstance(error, NoPlaceError)
    return w.RankDied(group, f"ranks could not be started: {error}", is_users)
