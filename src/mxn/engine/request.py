"""One generation under way: its sequence, how it samples, the text so far, and when it is done.

Knows no pages, no scheduling and no tensors. Start at `Request.advance`.
"""

from __future__ import annotations

from collections.abc import Collection

from mxn.engine.adapters import Adapter
from mxn.engine.detokenize import StreamDetokenizer, TokenDecoder
from mxn.engine.grammar import GrammarState
from mxn.engine.protocol import Delta, FinishReason, Generate, ModelInfo, TokenLogprob
from mxn.engine.sampler import SampledToken, SamplingState
from mxn.engine.sequence import Sequence


class Request:
    """One generation under way: its sequence, how it samples, the text so far."""

    __slots__ = (
        "_detokenizer",
        "_end_ids",
        "_limit",
        "_resumed_text",
        "adapter",
        "device_s",
        "end",
        "num_prompt_logprobs",
        "prompt_logprobs",
        "request_id",
        "sampling",
        "sampling_state",
        "sequence",
    )

    def __init__(
        self,
        message: Generate,
        info: ModelInfo,
        decoder: TokenDecoder,
        byte_ids: Collection[int],
        now_s: float,
        grammar: GrammarState | None = None,
    ) -> None:
        sampling = self.sampling = message.sampling
        self.request_id = message.request_id
        self.adapter: Adapter | None = None  # set by the loop, which knows them
        prompt = message.prompt_ids
        # Not even one token: the last logits of the prompt are computed, their token is dropped.
        room = None if sampling.max_tokens is None else max(1, sampling.max_tokens)
        self.num_prompt_logprobs = sampling.prompt_logprobs
        self.sequence = Sequence(
            message.request_id,
            prompt,
            output_ids=message.resume_ids,
            max_total_tokens=None if room is None else len(prompt) + room,
            arrival_s=now_s,
            priority=message.priority,
            wants_prompt_logits=sampling.prompt_logprobs is not None,
            can_draft=grammar is None,  # what it allows depends on each token before
        )
        ends = () if sampling.ignore_eos else info.eos_ids
        self.sampling_state = SamplingState(sampling, prompt, eos_ids=ends, grammar=grammar)
        self._end_ids = frozenset((*ends, *sampling.stop_token_ids))
        self._detokenizer = StreamDetokenizer(
            decoder,
            prompt_ids=prompt,
            skip_special_tokens=sampling.skip_special_tokens,
            stop=sampling.stop,
            include_stop_str=sampling.include_stop_str,
            min_tokens=sampling.min_tokens,
            byte_ids=byte_ids,
        )
        self.prompt_logprobs: list[TokenLogprob | None] | None = (
            None if sampling.prompt_logprobs is None else [None]
        )
        self.device_s = 0.0  # this request's share of the steps it ran in
        limit = self.sequence.max_total_tokens
        self._limit = info.max_context if limit is None else min(limit, info.max_context)
        self._resumed_text = ""  # comes out with the first delta
        self.end: Delta | None = None  # the whole answer, where nothing is left to generate
        if message.resume_ids:
            self._resume(message.resume_ids)

    def _resume(self, token_ids: list[int]) -> None:
        """Take over an answer that another replica began: everything is as if it was made here."""
        parts: list[str] = []
        for number, token_id in enumerate(token_ids, start=1):
            self.sampling_state.append(token_id)
            text, finish, stop = self._text_of(token_id, self.sequence.num_prompt + number)
            parts.append(text)
            if finish is not None:
                self._resumed_text = "".join(parts)
                self.end = self._delta([], "", None, finish, stop)
                return
        self._resumed_text = "".join(parts)

    @property
    def num_output(self) -> int:
        """Tokens of the answer so far."""
        return len(self.sampling_state.output_ids)

    def advance(self, token: SampledToken) -> Delta:
        """Return what `token`, which the scheduler has not appended yet, adds to the answer.

        Several tokens of one step are given one by one.
        """
        if self.sampling.max_tokens == 0:
            return self._delta([], "", None, "length", None)
        self.sampling_state.append(token.token_id)
        num_tokens = self.sequence.num_prompt + self.num_output
        text, finish, stop = self._text_of(token.token_id, num_tokens)
        logprobs = None if token.logprob is None else [token.logprob]
        return self._delta([token.token_id], text, logprobs, finish, stop)

    def _text_of(
        self, token_id: int, num_tokens: int
    ) -> tuple[str, FinishReason | None, str | int | None]:
        """Return (new text, how the answer ends here or None, what ended it).

        `num_tokens` counts prompt and answer with this token.
        """
        sampling = self.sampling
        if token_id in self._end_ids:  # never before min_tokens: the sampler does not choose it
            text, found = "", None
            if sampling.include_stop_str:
                text, found = self._detokenizer.push((token_id,))
            rest, found = self._detokenizer.finish() if found is None else ("", found)
            # The natural end is no stop that the caller asked for.
            asked = token_id if token_id in sampling.stop_token_ids else None
            return text + rest, "stop", asked if found is None else found
        text, found = self._detokenizer.push((token_id,))
        grammar = self.sampling_state.grammar
        if found is None and grammar is not None and grammar.is_over:
            rest, found = self._detokenizer.finish()
            return text + rest, "stop", found
        limit = self.sequence.max_total_tokens
        limit = self._limit if limit is None else min(limit, self._limit)
        if found is None and num_tokens >= limit:
            rest, found = self._detokenizer.finish()
            return text + rest, "length" if found is None else "stop", found
        return text, None if found is None else "stop", found

    def ended(self, finish: FinishReason) -> Delta:
        """Return the last delta of a request that ends without a further token."""
        text, _ = self._detokenizer.finish()
        return self._delta([], text, None, finish, None)

    def _delta(
        self,
        token_ids: list[int],
        text: str,
        logprobs: list[TokenLogprob] | None,
        finish: FinishReason | None,
        stop: str | int | None,
    ) -> Delta:
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        resumed, self._resumed_text = self._resumed_text, ""
        sequence = self.sequence
        return Delta(
            request_id=self.request_id,
            token_ids=token_ids,
            text=resumed + text,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish,
            stop_reason=stop,
            prompt_tokens=sequence.num_prompt,
            # Of an answer that is resumed, output may lie in the prefix cache too.
            cached_tokens=min(sequence.cached_tokens, sequence.num_prompt),
            completion_tokens=self.num_output,
            device_s=0.0 if finish is None else self.device_s,
        )
