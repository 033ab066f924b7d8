"""The loop of a replica that generates: requests in, one step, deltas out. Single-threaded.

Puts the parts together: the scheduler says who runs, the runner computes, each request turns its
token into text and says when it is done. Knows no processes and no tensors. Start at
`EngineCore.step`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING

from mxn.engine.adapters import NOT_FOUND_CODE, Adapters
from mxn.engine.counters import Counters
from mxn.engine.detokenize import TokenDecoder
from mxn.engine.protocol import (
    ENDED_CODE,
    Cancel,
    Delta,
    Encode,
    EngineStats,
    Failed,
    FromEngine,
    Generate,
    GetStats,
    LoadAdapter,
    ModelInfo,
    ToEngine,
    UnloadAdapter,
)
from mxn.engine.request import Request
from mxn.engine.validate import problem_of
from mxn.errors import (
    CapacityError,
    MxnError,
    NotFoundError,
    UserError,
)

if TYPE_CHECKING:
    from mxn.engine.grammar import Grammars, GrammarState
    from mxn.engine.plan import StepPlan
    from mxn.engine.protocol import Grammar
    from mxn.engine.runner import Runner, StepResult
    from mxn.engine.sampler import SampledToken
    from mxn.engine.scheduler import Scheduler

log = logging.getLogger("mxn.engine")

_AT_ONCE_S = 0.002  # most grammars are compiled in this time; others wait aside
_NAP_S = 0.005  # the longest wait for a grammar where there is nothing else to do
VALIDATE_EVERY_S = 60.0  # the invariants of pages and queues are checked this often, when idle


class EngineCore:
    """Takes messages with `handle`, works with `step` while `has_work`."""

    def __init__(
        self,
        info: ModelInfo,
        scheduler: Scheduler,
        runner: Runner,
        decoder: TokenDecoder,
        *,
        byte_ids: Collection[int] = frozenset(),
        max_waiting: int = 4096,
        adapters: Adapters | None = None,
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`byte_ids` comes from `detokenize.byte_fallback_ids`."""
        self.info = info
        self._scheduler = scheduler
        self._runner = runner
        self._decoder = decoder
        self._byte_ids = byte_ids
        self._max_waiting = max_waiting
        self._clock = clock
        self._adapters = adapters or Adapters(None, max_adapters=0)
        self._grammars = grammars
        self._requests: dict[str, Request] = {}
        self._compiling: dict[str, tuple[Generate, Future[GrammarState]]] = {}
        self._counters = Counters()
        self._validated_s = clock()

    @property
    def has_work(self) -> bool:
        return not self._scheduler.is_idle or bool(self._compiling) or self._adapters.is_reading

    @property
    def adapters(self) -> Adapters:
        return self._adapters

    def handle(self, message: ToEngine) -> list[FromEngine]:
        """Take a message; return what can be answered at once."""
        if isinstance(message, Generate):
            return self._add(message)
        if isinstance(message, Cancel):
            return self._cancel(message.request_id)
        if isinstance(message, LoadAdapter):
            return self._adapters.load(message)
        if isinstance(message, UnloadAdapter):
            return self._adapters.unload(message)
        if isinstance(message, GetStats):
            return [self.stats(message.request_id)]
        if isinstance(message, Encode):
            reason = f"this replica runs a {self.info.kind} ({self.info.family}); it cannot embed"
            return [_refusal(message.request_id, reason, "model_not_supported")]
        return []

    def step(self) -> list[FromEngine]:
        """Run one step and return what it brought.

        Raises: ChipError or InternalError when device or bookkeeping can no longer be trusted; the
        process must then end.
        """
        before = self._take_compiled() if self._compiling else []
        started_s = self._clock()
        plan = self._scheduler.next(started_s)
        if plan is None:
            return before + self._adapters.answers_soon()
        result = self._runner.run(plan, self._requests)
        elapsed_s = self._clock() - started_s
        self._share(plan, elapsed_s)
        self._scheduler.took(plan, elapsed_s)
        out = before + self._commit(plan, result) + self._adapters.answers()
        self._counters.steps_total += 1
        ended_s = self._clock()
        self._counters.busy_s += ended_s - started_s
        if self._scheduler.is_idle and ended_s - self._validated_s > VALIDATE_EVERY_S:
            self._scheduler.validate()
            self._validated_s = ended_s
        return out

    def _share(self, plan: StepPlan, elapsed_s: float) -> None:
        """Give each request its share of a step's time: as many parts as it had tokens in it."""
        part_s = elapsed_s / max(1, sum(item.num_tokens for item in plan.sequences))
        for item in plan.sequences:
            self._requests[item.sequence.seq_id].device_s += part_s * item.num_tokens

    def stats(self, request_id: str = "") -> EngineStats:
        """Return totals since the start and what is true now."""
        now = self._scheduler.stats()
        self._counters.preemptions_total = now.preemptions_total
        self._counters.prompt_tokens_total = now.prompt_tokens_total
        self._counters.cached_tokens_total = now.cached_tokens_total
        self._counters.drafts_total = now.drafts_total
        self._counters.draft_tokens_total = now.draft_tokens_total
        self._counters.accepted_draft_tokens_total = now.accepted_draft_tokens_total
        return self._counters.stats(
            request_id,
            num_running=now.num_running,
            num_waiting=now.num_waiting + len(self._compiling),
            kv_pages_total=now.pages_total,
            kv_pages_used=now.pages_used,
        )

    def abort_all(self, reason: str) -> list[FromEngine]:
        """Fail everything under way, for the end of the process."""
        compiling = list(self._compiling)
        for _, state in self._compiling.values():
            state.cancel()
        self._compiling.clear()
        return [
            *(self._drop(request_id, reason, ENDED_CODE) for request_id in list(self._requests)),
            *(_failed(request_id, reason, ENDED_CODE) for request_id in compiling),
        ]

    def validate(self) -> None:
        """Check every invariant. Raises: InternalError that names the broken one."""
        self._scheduler.validate()

    def _add(self, message: Generate) -> list[FromEngine]:
        request_id = message.request_id
        if request_id in self._requests or request_id in self._compiling:
            reason = f"request id {request_id!r} is already in use"
            return [_refusal(request_id, reason, None)]
        problem = problem_of(message, self.info)
        if problem:
            return [_refusal(request_id, *problem)]
        num_waiting = self._scheduler.num_waiting + len(self._compiling)
        if num_waiting >= self._max_waiting:
            reason = f"{num_waiting} requests are waiting, which is the limit"
            return [_failed(request_id, reason, "overloaded")]
        if message.sampling.grammar is not None:
            return self._compile(message, message.sampling.grammar)
        return self._admit(message, None)

    def _compile(self, message: Generate, wanted: Grammar) -> list[FromEngine]:
        """Have the grammar compiled beside the steps; the request waits for it."""
        request_id = message.request_id
        if self._grammars is None:
            return [_refusal(request_id, "this replica enforces no grammars", None)]
        try:
            state = self._grammars.prepare(wanted)
        except UserError as error:
            return [_error(request_id, error)]
        if not self._compiling:  # else it waits behind another
            wait((state,), _AT_ONCE_S)
        if state.done():
            return self._begin(message, state)
        self._compiling[request_id] = (message, state)
        return []

    def _take_compiled(self) -> list[FromEngine]:
        """Admit the requests whose grammars are ready; without other work, wait a little."""
        if self._scheduler.is_idle:
            wait([state for _, state in self._compiling.values()], _NAP_S, FIRST_COMPLETED)
        out: list[FromEngine] = []
        for message, state in list(self._compiling.values()):
            if state.done():
                del self._compiling[message.request_id]
                out += self._begin(message, state)
        return out

    def _begin(self, message: Generate, state: Future[GrammarState]) -> list[FromEngine]:
        try:
            return self._admit(message, state.result())
        except MxnError as error:
            return [_error(message.request_id, error)]

    def _admit(self, message: Generate, grammar: GrammarState | None) -> list[FromEngine]:
        request_id = message.request_id
        try:
            request = Request(
                message, self.info, self._decoder, self._byte_ids, self._clock(), grammar
            )
        except MxnError as error:  # the tokens to resume from do not follow the grammar
            return [_error(request_id, error)]
        if request.end is not None:
            return [request.end]
        if message.resume_ids and request.sequence.num_tokens >= self._scheduler.max_context:
            return [request.ended("length")]  # the cache has no room for another token
        try:
            self._use(request, message.adapter)
            self._scheduler.add(request.sequence)
        except NotFoundError as error:
            return [_refusal(request_id, str(error), NOT_FOUND_CODE)]
        except CapacityError as error:
            self._adapters.release(request.adapter)
            return [_refusal(request_id, str(error), "context_length_exceeded")]
        except UserError as error:
            self._adapters.release(request.adapter)
            return [_refusal(request_id, str(error), error.code)]
        self._requests[request_id] = request
        self._counters.requests_total += 1
        if self._scheduler.has_drafter and not request.sequence.can_draft:
            self._counters.undrafted_requests_total += 1
        return []

    def _use(self, request: Request, name: str | None) -> None:
        """Give a new request its adapter, and pages of its own. Raises: NotFoundError."""
        if name is not None:
            request.adapter = self._adapters.take(name)
            request.sequence.salt = request.adapter.salt

    def _cancel(self, request_id: str) -> list[FromEngine]:
        if compiling := self._compiling.pop(request_id, None):
            compiling[1].cancel()
            return [Delta(request_id=request_id, finish_reason="cancelled")]
        request = self._requests.pop(request_id, None)
        if request is None:  # it has ended meanwhile
            return []
        self._scheduler.cancel(request_id)
        self._runner.forget(request_id)
        self._adapters.release(request.adapter)
        self._counters.requests_cancelled_total += 1
        return [request.ended("cancelled"), *self._adapters.answers()]

    def _drop(self, request_id: str, reason: str, code: str | None = None) -> Failed:
        """End a request that cannot be finished, and free what it holds."""
        request = self._requests.pop(request_id)
        self._scheduler.cancel(request_id)
        self._runner.forget(request_id)
        self._adapters.release(request.adapter)
        return _failed(request_id, reason, code)

    def _fail(self, request_id: str, reason: str) -> Failed:
        """End a request that got no token; a grammar that allowed none says why."""
        grammar = self._requests[request_id].sampling_state.grammar
        failed = self._drop(request_id, reason)
        if grammar is None or grammar.problem is None:
            return failed
        return _error(request_id, grammar.problem)

    def _commit(self, plan: StepPlan, result: StepResult) -> list[FromEngine]:
        """Enter the results; the failed go first, so that the commit passes them over."""
        out: list[FromEngine] = [self._fail(*failed) for failed in result.failed.items()]
        requests = self._requests
        for request_id, scored in result.prompt_logprobs.items():
            request = requests.get(request_id)
            if request and request.prompt_logprobs is not None:
                request.prompt_logprobs += scored
        sampled: dict[str, tuple[int, ...]] = {}
        finished: list[str] = []
        for request_id, tokens in result.tokens.items():
            try:
                deltas = _advance(requests[request_id], tokens)
            except MxnError as error:  # its grammar failed; the others of the step go on
                self._drop(request_id, error.message)
                out.append(_error(request_id, error))
                continue
            sampled[request_id] = tuple(token.token_id for token in tokens[: len(deltas)])
            self._counters.generation_tokens_total += sum(len(d.token_ids) for d in deltas)
            if deltas[-1].finish_reason:
                finished.append(request_id)
            out += deltas
        self._scheduler.commit(plan, sampled, finished)
        for request_id in finished:
            request = requests.pop(request_id)
            self._runner.forget(request_id)
            self._adapters.release(request.adapter)
        return out


def _advance(request: Request, tokens: list[SampledToken]) -> list[Delta]:
    """Return a delta for each token, up to the one that ends the answer. Raises: MxnError."""
    deltas = []
    for token in tokens:
        delta = request.advance(token)
        deltas.append(delta)
        if delta.finish_reason:
            break
    return deltas


def _refusal(request_id: str, message: str, code: str | None) -> Failed:
    return Failed(request_id=request_id, message=message, is_user_error=True, code=code)


def _failed(request_id: str, message: str, code: str | None = None) -> Failed:
    return Failed(request_id=request_id, message=message, is_user_error=False, code=code)


def _error(request_id: str, error: MxnError) -> Failed:
    """Return the failure of one request, which says nothing of the engine."""
    is_user_error = isinstance(error, UserError)
    return Failed(
        request_id=request_id, message=str(error), is_user_error=is_user_error, code=error.code
    )
