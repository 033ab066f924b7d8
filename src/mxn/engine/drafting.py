"""Which sequences of a step carry guesses of their next tokens, and how many came true.

Knows plans and pages; a `Drafter` makes the guesses. Start at `Drafting.plan`.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from mxn.engine.kvcache import PageTable
from mxn.engine.plan import Drafter, ScheduledSequence, SchedulerConfig
from mxn.engine.sequence import Sequence
from mxn.errors import InternalError


class Drafting:
    """Gives drafts their places in steps that stay small, and keeps count of them."""

    def __init__(self, config: SchedulerConfig, pages: PageTable, max_context: int) -> None:
        """`max_context` is what prompt and answer can have at most."""
        self._config, self._pages = config, pages
        self._max_context = max_context
        self.num_drafts = 0  # times that a sequence carried drafts in a step
        self.num_tokens = 0
        self.num_accepted = 0

    def plan(
        self,
        drafter: Drafter,
        scheduled: list[ScheduledSequence],
        budget: int,
        num_running: int,
    ) -> int:
        """Let decodes carry drafts while the step stays small; return the budget left.

        Each of the `num_running` sequences may soon need a page: drafts leave it that.
        """
        num_rows = self._config.max_batch_tokens - budget
        room = min(budget, self._config.max_draft_rows - num_rows)
        decodes = [
            (index, item)
            for index, item in enumerate(scheduled)
            if item.num_tokens == 1 and item.samples and item.start >= item.sequence.num_prompt
        ]
        for place, (index, item) in enumerate(decodes):
            if room <= 0:
                break
            share = -(-room // (len(decodes) - place))
            drafts = self._propose(drafter, item.sequence, share, num_running)
            if drafts:
                num_tokens = 1 + len(drafts)
                scheduled[index] = item._replace(
                    num_tokens=num_tokens, num_logits=num_tokens, drafts=drafts
                )
                room -= len(drafts)
                budget -= len(drafts)
        return budget

    def _propose(self, drafter: Drafter, seq: Sequence, share: int, num_running: int) -> list[int]:
        left = (seq.max_total_tokens or self._max_context) - len(seq.token_ids)
        limit = min(share, left - 1)  # one more token comes with the drafts
        if limit <= 0 or not seq.can_draft:
            return []
        return self._give_pages(seq, drafter.propose(seq, limit)[:limit], num_running)

    def _give_pages(self, seq: Sequence, drafts: list[int], num_running: int) -> list[int]:
        """Return as many of `drafts` as have a place without taking a page that others may need."""
        pages, num_tokens = self._pages, len(seq.token_ids)
        num_held = len(pages.pages_of(seq.seq_id))
        num_fresh = pages.pages_needed(num_tokens + len(drafts)) - num_held
        if num_fresh <= 0:
            return drafts
        if num_fresh + num_running <= pages.pages_free:
            pages.grow(seq.seq_id, num_tokens + len(drafts))
            return drafts
        return drafts[: num_held * pages.page_tokens - num_tokens]

    def count_accepted(self, seq_id: str, drafts: Ordered[int], tokens: Ordered[int]) -> int:
        """Return how many of `drafts` came true and count as computed.

        Raises: InternalError when the tokens before the last do not follow the drafts.
        """
        num_accepted = min(max(0, len(tokens) - 1), len(drafts))
        if list(tokens[:num_accepted]) != list(drafts[:num_accepted]):
            raise InternalError(f"sequence {seq_id!r}: {tokens!r} do not follow drafts {drafts!r}")
        self.num_drafts += 1
        self.num_tokens += len(drafts)
        self.num_accepted += num_accepted
        return num_accepted
