"""What a scheduler is told, and what it says: settings, a step's plan, what there is to count.

Plain values; knows no rules. Start at `StepPlan`.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mxn.engine.sequence import Sequence
from mxn.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    max_batch_tokens: int  # new tokens in one step, over all sequences
    max_sequences: int  # sequences that hold pages
    max_context: int  # prompt and output tokens of one sequence
    prefill_chunk: int | None = None  # new tokens of one sequence in one step; None: the budget
    priority_step_s: float = 10.0  # one level of priority is worth this much earlier arrival
    max_draft_rows: int = 16  # drafts make no step larger than this; 0: no drafts

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_sequences", "max_context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.max_batch_tokens < self.max_sequences:
            raise ConfigError(
                f"max_batch_tokens {self.max_batch_tokens!r} is less than max_sequences "
                f"{self.max_sequences!r}: each running sequence needs one token of a step",
                hint="raise max_batch_tokens or lower max_sequences",
            )
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ConfigError(f"prefill_chunk must be at least 1, got {self.prefill_chunk!r}")
        if self.max_draft_rows < 0:
            raise ConfigError(f"max_draft_rows must be 0 or more, got {self.max_draft_rows!r}")
        if self.priority_step_s < 0:
            raise ConfigError(f"priority_step_s must not be negative, got {self.priority_step_s!r}")


class Drafter(Protocol):
    """Guesses the next tokens of sequences that decode; see `mxn.engine.draft`."""

    def propose(self, seq: Sequence, limit: int) -> list[int]:
        """Return up to `limit` tokens that may follow `seq`; none where a guess does not pay."""
        ...

    def observe(self, seq_id: str, num_drafted: int, num_accepted: int) -> None:
        """Learn how many of the last guesses came true."""
        ...

    def observe_step(self, num_sequences: int, num_drafts: int, elapsed_s: float) -> None:
        """Learn what a step of decodes took."""
        ...

    def forget(self, seq_id: str) -> None:
        """The sequence is gone."""
        ...


class ScheduledSequence(NamedTuple):
    """The part of one sequence in a step: tokens ``start : start + num_tokens`` are computed.

    The last `drafts` of them are guesses behind the tokens of the sequence.
    """

    sequence: Sequence
    start: int  # tokens before it are in the cache
    num_tokens: int
    pages: list[int]  # the live list of the page table, in token order; covers all tokens
    samples: bool  # the chunk reaches the last token: a new one is to be sampled
    num_logits: (
        int  # logits are wanted for this many last rows of the chunk; 1 when it only samples
    )
    drafts: Ordered[int] = ()

    @property
    def seq_id(self) -> str:
        return self.sequence.seq_id


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. `sequences` has decodes first, then chunks of prompts."""

    step: int
    sequences: tuple[ScheduledSequence, ...]
    num_tokens: int
    admitted: tuple[str, ...]  # began (or began again) in this step
    preempted: tuple[str, ...]  # lost their pages before this step

    @property
    def is_decode(self) -> bool:
        """Every sequence computes one token, its last, and samples the next; none has drafts."""
        items = self.sequences
        return self.num_tokens == len(items) and all([item.samples for item in items])


class SchedulerStats(NamedTuple):
    num_running: int
    num_waiting: int
    pages_total: int
    pages_used: int
    pages_cached: int
    steps_total: int
    preemptions_total: int
    prompt_tokens_total: int  # of sequences scheduled at least once
    cached_tokens_total: int  # of those, found in the prefix cache
    drafts_total: int  # times that a sequence carried drafts in a step
    draft_tokens_total: int
    accepted_draft_tokens_total: int
