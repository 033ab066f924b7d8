"""An engine in this very process, synchronous: for `mxn run`, benches and tests.

Start at `LocalEngine.generate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mxn.engine.client import error_of, load_error_of
from mxn.engine.config import EngineConfig
from mxn.engine.core import EngineCore
from mxn.engine.load import Report, build_engine
from mxn.engine.protocol import (
    AdapterLoaded,
    Delta,
    EngineStats,
    Failed,
    FinishReason,
    Generate,
    LoadAdapter,
    SamplingParams,
    TokenLogprob,
    UnloadAdapter,
)
from mxn.errors import InternalError, UnsupportedError


@dataclass(slots=True)
class Completion:
    """A whole answer: its deltas joined."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def add(self, delta: Delta) -> None:
        """Join the next delta."""
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.logprobs += delta.logprobs or []
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.prompt_tokens, self.cached_tokens = delta.prompt_tokens, delta.cached_tokens


class LocalEngine:
    """A decoder without a process around it. Not thread safe."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._num_requests = 0

    @classmethod
    def load(cls, config: EngineConfig, on_progress: Report | None = None) -> LocalEngine:
        """Load the replica of `config` into this process.

        Raises: UnsupportedError for an encoder, and whatever loading raises.
        """
        core = build_engine(config, on_progress or (lambda stage, done, total: None))
        if not isinstance(core, EngineCore):
            raise UnsupportedError(
                f"{config.model!r} is a {core.info.kind}; it does not generate text"
            )
        return cls(core)

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        adapters: Sequence[str | None] | None = None,
    ) -> list[Completion]:
        """Return the answers to token prompts, in order; they run together.

        `adapters` names the one of each prompt; None: the base model.
        Raises: UserError subclasses when a request is refused, InternalError when one fails.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        names = [None] * len(prompts) if adapters is None else adapters
        ids = [self._submit(*each) for each in zip(prompts, each, names, strict=True)]
        answers = {request_id: Completion() for request_id in ids}
        while self.core.has_work:
            for reply in self.core.step():
                if isinstance(reply, Failed):
                    self.core.abort_all("another request of the call failed")
                    raise error_of(reply)
                if isinstance(reply, Delta) and reply.request_id in answers:
                    answers[reply.request_id].add(reply)
        return [answers[request_id] for request_id in ids]

    def stream(self, prompt: list[int], sampling: SamplingParams) -> Iterator[Delta]:
        """Yield the deltas of one answer; closing the generator cancels it."""
        from mxn.engine.protocol import Cancel

        request_id = self._submit(prompt, sampling)
        is_finished = False
        try:
            while not is_finished:
                for reply in self.core.step():
                    if not isinstance(reply, Delta | Failed) or reply.request_id != request_id:
                        continue
                    is_finished = isinstance(reply, Failed) or reply.finish_reason is not None
                    if isinstance(reply, Failed):
                        raise error_of(reply)
                    yield reply
        finally:
            if not is_finished:
                self.core.handle(Cancel(request_id=request_id))

    def load_adapter(self, name: str, path: str) -> AdapterLoaded:
        """Load a LoRA adapter in PEFT's layout, in place of one that has its name.

        Raises: NotFoundError, UnsupportedError or CapacityError, with the reason.
        """
        return self._change(LoadAdapter(request_id=self._new_id(), name=name, path=path))

    def unload_adapter(self, name: str) -> AdapterLoaded:
        """Forget an adapter. Raises: NotFoundError."""
        return self._change(UnloadAdapter(request_id=self._new_id(), name=name))

    def stats(self) -> EngineStats:
        return self.core.stats()

    def _new_id(self) -> str:
        self._num_requests += 1
        return f"local-{self._num_requests}"

    def _change(self, message: LoadAdapter | UnloadAdapter) -> AdapterLoaded:
        replies = self.core.handle(message)
        while not replies and self.core.adapters.is_reading:
            replies = self.core.adapters.answers_soon()
        while not replies and self.core.has_work:  # until the requests that use it have ended
            replies = [r for r in self.core.step() if isinstance(r, AdapterLoaded)]
        match replies:
            case [AdapterLoaded() as loaded]:
                return loaded
            case [Failed() as failed]:
                raise load_error_of(failed)
        raise InternalError(f"the engine answered {message!r} with {replies!r}")

    def _submit(
        self, prompt: list[int], sampling: SamplingParams, adapter: str | None = None
    ) -> str:
        request_id = self._new_id()
        message = Generate(
            request_id=request_id, prompt_ids=prompt, sampling=sampling, adapter=adapter
        )
        for reply in self.core.handle(message):
            if isinstance(reply, Failed):
                self.core.abort_all("another request of the call was refused")
                raise error_of(reply)
        return request_id
