"""Runs a rank's row of actions for one step: receive, compute, send, in the order of the schedule.

Receives are posted a few actions ahead and sends never wait, so a row that some order of the other
rows can serve does not block. Knows modules, messages and the row; knows nothing of the optimizer
or of other pipelines. Start at `Executor.run`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mxn.train.plan.schedules import Action, Row, split_backwards
from mxn.train.run.bridge import Bridge, Handle
from mxn.train.run.data.batch import MicroBatch
from mxn.train.run.deferred import DeferredWeights
from mxn.train.run.net import StageModule
from mxn.train.run.placement import Place, Placement, channel
from mxn.train.run.team import RankTeam

AHEAD = 4
"""Receives posted before they are needed. More hides longer links and takes more memory."""


@dataclass(slots=True)
class StepWork:
    """What a rank did in a step. Times are seconds of this rank's thread."""

    losses: list[Tensor] = field(default_factory=list)  # sums, one per micro-batch, if it has heads
    num_tokens: int = 0  # labels that counted there
    num_done: int = 0  # micro-batches
    total_s: float = 0.0
    waited_s: float = 0.0  # for activations and gradients of its neighbours


@dataclass(frozen=True, slots=True, kw_only=True)
class _Need:
    """A message that an action waits for."""

    kind: str  # "F": activations, "B": gradients
    boundary: int  # behind which part
    micro_batch: int
    sender: int


class Executor:
    """One rank's part of a pipeline. `run` does a step."""

    def __init__(
        self,
        placement: Placement,
        place: Place,
        row: Row,
        modules: Sequence[StageModule],
        bridge: Bridge,
        *,
        dtypes: Sequence[torch.dtype],
        team: RankTeam | None = None,
        deferred: Sequence[DeferredWeights] = (),
        before_last: Callable[[int], None] = lambda chunk: None,
        after_last: Callable[[int], None] = lambda chunk: None,
    ) -> None:
        """`modules` by chunk; `dtypes` of what each part of this pipeline computes in; `team`:
        the ranks of this stage, where it has several.

        `deferred` by chunk, needed where the row has weight halves. `before_last` and `after_last`
        are called around the action that completes a chunk's gradients.
        """
        self._placement, self._place, self._row = placement, place, row
        self._modules, self._bridge, self._dtypes = modules, bridge, dtypes
        self._team, self._deferred = team, deferred
        self._before_last, self._after_last = before_last, after_last
        self._num_stages = len(placement.pipeline_of(place.rank).stages)
        self._num_parts = placement.num_parts(place.pipeline)
        plan = placement.plan
        self.shape = (plan.micro_batch, plan.seq_tokens, modules[0].spec.hidden)
        self._split = split_backwards(row)
        self._needs = {action: self._need_of(action) for action in row}
        self._last = {
            chunk: max(at for at, action in enumerate(row) if action.chunk == chunk)
            for chunk in range(len(modules))
        }

    def run(
        self,
        batches: Callable[[int], MicroBatch],
        *,
        loss_scale: float = 1.0,
        more: Callable[[], int | None] | None = None,
    ) -> StepWork:
        """Do one step; `batches` gives this pipeline's micro-batches, on the device, by number.

        Gradients come out multiplied by `loss_scale`, losses do not. `more`, for a pipeline of one
        rank: behind its own micro-batches it does those that this gives it, until None.
        """
        step = _Step(self, batches, self._bridge, loss_scale)
        begin_s = time.perf_counter()
        for at, action, is_last in self._actions(more):
            step.look_ahead(at)
            if is_last:
                self._before_last(action.chunk)
            step.do(action)
            if is_last:
                self._after_last(action.chunk)
        step.finish()
        if self._bridge.device.type != "cpu":  # work that was started only is not done yet
            torch.accelerator.current_stream(self._bridge.device).record_event().synchronize()
        step.work.total_s = time.perf_counter() - begin_s
        return step.work

    def _actions(self, more: Callable[[], int | None] | None) -> Iterator[tuple[int, Action, bool]]:
        """Yield place in the row, action, and whether it is the last one of its chunk."""
        for at, action in enumerate(self._row):
            is_last = at == self._last[action.chunk]
            if more is not None and is_last:
                while (number := self._one_more(more)) is not None:
                    yield at, action, False
                    yield at, action._replace(kind="F", micro_batch=number), False
                    action = action._replace(micro_batch=number)
            yield at, action, is_last

    def _one_more(self, more: Callable[[], int | None]) -> int | None:
        """Ask when the device has come as far as this thread: the host runs ahead of some."""
        if self._bridge.device.type != "cpu":
            torch.accelerator.current_stream(self._bridge.device).synchronize()
        return more()

    def part(self, chunk: int) -> int:
        return chunk * self._num_stages + self._place.stage

    def peer(self, part: int) -> int | None:
        return self._placement.peer(self._place.rank, part)

    def is_spread(self, part: int) -> bool:
        """Return whether what comes from a part is given on by the first rank of this team."""
        theirs = self._placement.team_of_part(self._place.pipeline, part)
        return len(theirs) != len(self._placement.team_of(self._place.rank)) > 1

    def _need_of(self, action: Action) -> _Need | None:
        """Return what must come from another rank before an action, if anything."""
        part = self.part(action.chunk)
        if action.kind == "F" and part > 0:
            sender, boundary = self.peer(part - 1), part - 1
        elif action.kind == "B" and part < self._num_parts - 1:
            sender, boundary = self.peer(part + 1), part
        else:
            return None
        if sender is None or sender == self._place.rank:
            return None
        return _Need(
            kind=action.kind, boundary=boundary, micro_batch=action.micro_batch, sender=sender
        )

    def tag(self, kind: str, boundary: int, micro_batch: int) -> int:
        """Return a tag that no other message under way has."""
        return ((micro_batch * self._num_parts + boundary) * 2 + (kind == "B")) % (1 << 20)


class _Step:
    """What is under way while a step runs."""

    def __init__(
        self,
        executor: Executor,
        batches: Callable[[int], MicroBatch],
        bridge: Bridge,
        loss_scale: float,
    ) -> None:
        self.work = StepWork()
        self._loss_scale = loss_scale
        self._executor, self._batches, self._bridge = executor, batches, bridge
        self._incoming: dict[tuple[str, int, int], Handle] = {}
        self._sent: deque[Handle] = deque()
        self._kept: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self._owed: dict[tuple[int, int], list] = {}
        self._here: dict[tuple[str, int, int], Tensor] = {}  # between chunks of this very rank
        self._wanted = self._in_order()
        self._posted = 0  # receives posted so far, of `_wanted`

    def look_ahead(self, at: int) -> None:
        """Post the receives of the next actions."""
        while self._posted < len(self._wanted):
            place, need = self._wanted[self._posted]
            if place > at and len(self._incoming) >= AHEAD:
                return
            self._post(need)
            self._posted += 1

    def do(self, action: Action) -> None:
        match action.kind:
            case "F":
                self._forward(action.chunk, action.micro_batch)
            case "B":
                self._backward(action.chunk, action.micro_batch)
            case "W":
                owed = self._owed.pop((action.chunk, action.micro_batch))
                self._executor._deferred[action.chunk].pay(owed)

    def finish(self) -> None:
        """Wait until all that was sent has left."""
        while self._sent:
            self._sent.popleft().wait()

    def _forward(self, chunk: int, micro_batch: int) -> None:
        executor, part = self._executor, self._executor.part(chunk)
        module = executor._modules[chunk]
        batch = self._batches(micro_batch)
        self.work.num_done += chunk == 0
        x = None
        if part > 0:
            x = self._take("F", part - 1, micro_batch).requires_grad_()
        out = module(x, batch)
        if part == executor._num_parts - 1:
            self.work.losses.append(out.detach())
            self.work.num_tokens += batch.num_tokens
        else:
            self._give("F", part, micro_batch, out.detach(), executor.peer(part + 1))
        self._kept[chunk, micro_batch] = x, out

    def _backward(self, chunk: int, micro_batch: int) -> None:
        executor, part = self._executor, self._executor.part(chunk)
        x, out = self._kept.pop((chunk, micro_batch))
        if part == executor._num_parts - 1:
            gradient = torch.full_like(out, self._loss_scale)
        else:
            gradient = self._take("B", part, micro_batch)
        is_split = (chunk, micro_batch) in executor._split
        later = executor._deferred[chunk].put_off() if is_split else nullcontext([])
        with later as owed:
            if out.requires_grad:  # not where nothing of the first chunk is trained
                torch.autograd.backward(out, gradient)
        if is_split:
            self._owed[chunk, micro_batch] = owed
        if x is not None:
            assert x.grad is not None
            self._give("B", part - 1, micro_batch, x.grad, executor.peer(part - 1))

    def _give(
        self, kind: str, boundary: int, micro_batch: int, tensor: Tensor, to: int | None
    ) -> None:
        if to is None:
            return  # the first rank of this team has the same and gives it
        if to == self._executor._place.rank:
            self._here[kind, boundary, micro_batch] = tensor
            return
        handle = self._bridge.send(
            tensor,
            to,
            self._executor.tag(kind, boundary, micro_batch),
            channel=channel(kind, boundary),
            what=_words(kind, boundary, micro_batch),
        )
        self._sent.append(handle)
        while self._sent and self._sent[0].is_done():  # lets go of memory that has left
            self._sent.popleft().wait()

    def _take(self, kind: str, boundary: int, micro_batch: int) -> Tensor:
        key = kind, boundary, micro_batch
        if key in self._here:
            return self._here.pop(key)
        executor, begin_s = self._executor, time.perf_counter()
        if key in self._incoming:
            tensor = self._incoming.pop(key).wait()
        else:
            tensor = torch.empty(
                executor.shape, dtype=executor._dtypes[boundary], device=self._bridge.device
            )
        if executor.is_spread(boundary if kind == "F" else boundary + 1):
            assert executor._team is not None
            executor._team.spread(tensor)
        self.work.waited_s += time.perf_counter() - begin_s
        return tensor

    def _in_order(self) -> list[tuple[int, _Need]]:
        executor = self._executor
        found: Iterator[tuple[int, _Need | None]] = (
            (at, executor._needs[action]) for at, action in enumerate(executor._row)
        )
        return [(at, need) for at, need in found if need is not None]

    def _post(self, need: _Need) -> None:
        executor, key = self._executor, (need.kind, need.boundary, need.micro_batch)
        self._incoming[key] = self._bridge.recv(
            executor.shape,
            executor._dtypes[need.boundary],
            need.sender,
            executor.tag(*key),
            channel=channel(need.kind, need.boundary),
            what=_words(*key),
        )


def _words(kind: str, boundary: int, micro_batch: int) -> str:
    what = "activations" if kind == "F" else "gradients"
    return f"{what} of micro-batch {micro_batch} behind part {boundary}"
