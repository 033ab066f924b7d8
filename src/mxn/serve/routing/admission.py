"""The queue in front of full replicas: fair between tenants, bounded, with deadlines.

Start-time fair queueing: each flow (a tenant at a priority) has a virtual time that grows by tokens
÷ weight; the flow that is furthest behind goes next. Two steps of priority halve the weight, so
low priority is slow and never starves. Pure: times are arguments, nobody is woken up here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mxn.errors import OverloadedError

Chips = frozenset[str] | None
"""The chips a request is restricted to; None: all."""

Target = Chips | tuple[Chips, tuple[str, ...]]
"""Where a request may run: chips, and the replicas that it may not use, where there are such."""

MAX_PRIORITY = 20  # weights differ by at most 2 ** 10 either way
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_RATE_EWMA = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionRules:
    max_waiting: int = 1024  # requests in the queue
    max_wait_s: float = 30.0  # of a request without a nearer deadline


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """A request: waiting, or running once it was admitted."""

    tenant: str
    cost: float  # tokens, estimated
    weight: float = 1.0
    priority: int = 0
    deadline_s: float = float("inf")
    target: Target = None  # it runs only there
    start: float = 0.0  # virtual time

    @property
    def share(self) -> float:
        """The weight with its priority; always above 0."""
        steps = min(MAX_PRIORITY, max(-MAX_PRIORITY, self.priority))
        return max(self.weight, 1e-6) * 2.0 ** (-steps / 2)


@dataclass(slots=True)
class _Flow:
    finish: float = 0.0  # virtual time up to which it has had service
    waiting: deque[Entry] = field(default_factory=deque)


class Admission:
    """Who runs next. The caller asks `next` whenever a replica has room."""

    def __init__(self, rules: AdmissionRules | None = None) -> None:
        self.rules = rules or AdmissionRules()
        self._flows: dict[tuple[str, int], _Flow] = {}
        self._virtual = 0.0
        self._num_waiting = 0
        self._num_running = 0
        self._gap_s: float | None = None  # usual time between two requests that end
        self._ended_s = 0.0

    def __len__(self) -> int:
        return self._num_waiting

    def admit(self, entry: Entry) -> None:
        """Count a request that runs at once, because nobody waits and there is room."""
        flow = self._flow(entry)
        self._run(flow, entry, max(self._virtual, flow.finish))

    def wait(self, entry: Entry, now_s: float) -> Entry | None:
        """Queue a request; return the one that had to leave for it, if any.

        A full queue drops the newest request of the flow that takes more than its share of it.
        Raises: OverloadedError when that is the new one itself.
        """
        entry.deadline_s = min(entry.deadline_s, now_s + self.rules.max_wait_s)
        victim = None
        if self._num_waiting >= self.rules.max_waiting:
            victim = self._victim(entry)
            if victim is None:
                raise self.overloaded(f"{self._num_waiting} requests wait already")
            self.remove(victim)
        flow = self._flow(entry)
        if not flow.waiting:
            flow.finish = max(flow.finish, self._virtual)
        flow.waiting.append(entry)
        self._num_waiting += 1
        return victim

    def next(self, has_room: Callable[[Target], bool]) -> Entry | None:
        """Return the request to run now and count it as running; None when none has room.

        `has_room(target)` says whether a request restricted to `target` could run.
        """
        if not self._num_waiting:
            return None
        best: tuple[_Flow, Entry] | None = None
        rooms: dict[Target, bool] = {}
        for flow in self._flows.values():
            if not flow.waiting or (best is not None and flow.finish >= best[0].finish):
                continue
            for entry in flow.waiting:
                if entry.target not in rooms:
                    rooms[entry.target] = has_room(entry.target)
                if rooms[entry.target]:
                    best = flow, entry
                    break
        if best is None:
            return None
        flow, entry = best
        flow.waiting.remove(entry)
        self._num_waiting -= 1
        self._run(flow, entry, flow.finish)
        return entry

    def remove(self, entry: Entry) -> None:
        """Take a request out of the queue: its client left, or its time is over."""
        self._flow(entry).waiting.remove(entry)
        self._num_waiting -= 1

    def expired(self, now_s: float) -> list[Entry]:
        """Take out and return the requests whose deadline has passed."""
        late = [
            entry
            for flow in self._flows.values()
            for entry in flow.waiting
            if entry.deadline_s <= now_s
        ]
        for entry in late:
            self.remove(entry)
        return late

    def ended(self, entry: Entry, actual: float, now_s: float) -> None:
        """A running request ended with `actual` tokens, which replace the estimate."""
        self._num_running -= 1
        flow = self._flow(entry)
        flow.finish = max(entry.start, flow.finish + (actual - entry.cost) / entry.share)
        if self._gap_s is None:
            self._gap_s = None if not self._ended_s else now_s - self._ended_s
        else:
            self._gap_s += _RATE_EWMA * (now_s - self._ended_s - self._gap_s)
        self._ended_s = now_s
        self._tidy()

    def retry_after_s(self) -> float:
        """Return when the queue is probably empty, from how fast requests ended lately."""
        expected = (self._num_waiting + 1) * (self._gap_s or 0.0)
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, expected))

    def overloaded(self, why: str) -> OverloadedError:
        retry_s = self.retry_after_s()
        return OverloadedError(
            f"all replicas are full: {why}",
            retry_after_s=retry_s,
            hint=f"retry in about {retry_s:.0f} s",
        )

    def validate(self) -> None:
        """Check the invariants; for tests."""
        assert self._num_waiting == sum(len(flow.waiting) for flow in self._flows.values())
        assert self._num_waiting <= self.rules.max_waiting
        assert self._num_running >= 0

    def _flow(self, entry: Entry) -> _Flow:
        key = (entry.tenant, entry.priority)
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = _Flow(finish=self._virtual)
        return flow

    def _run(self, flow: _Flow, entry: Entry, start: float) -> None:
        entry.start = start
        self._virtual = max(self._virtual, start)
        flow.finish = start + entry.cost / entry.share
        self._num_running += 1

    def _victim(self, entry: Entry) -> Entry | None:
        """Return the newest request of the flow with the longest queue for its share."""

        def length(flow: _Flow) -> float:
            return len(flow.waiting) / flow.waiting[0].share

        longest = max((flow for flow in self._flows.values() if flow.waiting), key=length)
        own = (len(self._flow(entry).waiting) + 1) / entry.share
        return longest.waiting[-1] if own < length(longest) else None

    def _tidy(self) -> None:
        """Forget flows that say nothing: nobody waits and they are not ahead of the others."""
        if len(self._flows) <= 64:
            return
        gone = [
            key
            for key, flow in self._flows.items()
            if not flow.waiting and flow.finish <= self._virtual
        ]
        for key in gone:
            del self._flows[key]
