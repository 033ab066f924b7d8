"""One token sequence under way: what it was asked, what it has produced, how far the cache has it.

Knows no sampling, no text and no pages. The scheduler changes it; the runner reads it.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mxn.engine.kvcache import PrefixKeys


class SequenceState(Enum):
    NEW = "new"  # not yet given to a scheduler
    WAITING = "waiting"  # holds no pages
    RUNNING = "running"  # holds pages for all its tokens
    FINISHED = "finished"  # holds no pages, except until the commit of a step in flight


class Sequence:
    """A prompt and its continuation.

    `token_ids` is prompt and output in one list: after a preemption the output is computed again
    just like a prompt. Read it, never change it; `Scheduler.commit` appends.
    """

    __slots__ = (
        "arrival_s",
        "cached_tokens",
        "can_draft",
        "first_scheduled_s",
        "keys",
        "max_total_tokens",
        "num_computed",
        "num_preemptions",
        "num_prompt",
        "num_prompt_logits",
        "order",
        "priority",
        "salt",
        "seq_id",
        "state",
        "token_ids",
        "wants_prompt_logits",
    )

    def __init__(
        self,
        seq_id: str,
        prompt_ids: list[int],
        *,
        output_ids: list[int] | None = None,
        max_total_tokens: int | None = None,
        arrival_s: float = 0.0,
        priority: int = 0,
        salt: bytes = b"",
        wants_prompt_logits: bool = False,
        can_draft: bool = True,
    ) -> None:
        self.seq_id = seq_id
        # Output that another replica made comes with the prompt, and is computed like it.
        self.token_ids = [*prompt_ids, *(output_ids or ())]
        self.num_prompt = len(prompt_ids)
        self.max_total_tokens = max_total_tokens  # prompt and output; None: the whole context
        self.arrival_s = arrival_s
        self.priority = priority  # smaller runs first
        self.salt = salt  # sequences with different salts never share pages
        self.wants_prompt_logits = wants_prompt_logits
        self.can_draft = can_draft  # a step may carry guesses of its next tokens
        self.state = SequenceState.NEW
        self.num_computed = 0  # leading tokens whose keys and values are in the cache
        self.num_prompt_logits = 0  # leading prompt positions whose logits were delivered
        self.cached_tokens = 0  # prompt tokens found in the prefix cache when first scheduled
        self.num_preemptions = 0
        self.first_scheduled_s: float | None = None
        self.order: tuple[float, int] = (0.0, 0)  # set by the scheduler: smaller goes first
        self.keys: PrefixKeys | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def prompt_ids(self) -> list[int]:
        """A copy."""
        return self.token_ids[: self.num_prompt]

    @property
    def output_ids(self) -> list[int]:
        """A copy."""
        return self.token_ids[self.num_prompt :]

    @property
    def remaining_tokens(self) -> int:
        """Known tokens that are not in the cache yet; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_finished(self) -> bool:
        return self.state is SequenceState.FINISHED

    @property
    def is_full(self) -> bool:
        """No further token may be sampled."""
        return self.max_total_tokens is not None and len(self.token_ids) >= self.max_total_tokens

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id!r}, {self.state.value}, prompt {self.num_prompt}, "
            f"output {self.num_output}, computed {self.num_computed})"
        )
