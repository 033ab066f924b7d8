"""Guesses the next tokens of a sequence, and knows when that does not pay.

Pure: knows token ids and how many guesses came true; knows no tensors, pages and no clock. A wrong
guess costs time and changes no token: whoever uses it verifies it. Start at
`NgramDrafter`; `MtpDrafter` keeps what the runner lets the model guess.

Prompt lookup: where the last tokens stood before, what followed them then may follow them now.
Source: A. Saxena, "Prompt Lookup Decoding" (2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mxn.engine.sequence import Sequence

LONGEST_MATCH = 3
_NOTED_AT_ONCE = 1024  # tokens, 5 ms: all sequences wait for it, so long prompts take several steps
_SHIFT = 32  # token ids fit below; an n-gram is one integer

_WEIGHT = 1 / 16  # of one draft in the running rate of acceptance
_START_RATE = 0.6  # what a sequence is credited with before it has shown anything
_UNKNOWN_COST = 0.1  # of a draft, as a part of a step without drafts, until it was measured
# After so many steps with drafts and none without, one goes without: until it was seen so often
# that its time is known, and from then on, when contexts have grown.
_PLAIN_SOON, _PLAIN_KNOWN, _PLAIN_LATER = 8, 3, 128
_PAYS_FROM, _PAYS_SURELY = 0.05, 0.8  # bounds of the rate of acceptance from which drafts pay
_FIRST_PAUSE = 16  # tokens without drafts once they do not pay; doubled each time
_LONGEST_PAUSE = 512


class NgramIndex:
    """Where each run of 1 to 3 tokens was last followed by a further one. O(1) for each token."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        # For each length: n-gram -> position of the token behind its last occurrence.
        self._behind: tuple[dict[int, int], ...] = tuple({} for _ in range(LONGEST_MATCH))
        self._last: list[int] = [-1] * LONGEST_MATCH  # the n-grams that end the tokens; -1: none

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: list[int]) -> None:
        """Take note of tokens that follow those it knows."""
        for token in token_ids:
            self._append(token)

    def _append(self, token: int) -> None:
        position, last = len(self._tokens), self._last
        for behind, gram in zip(self._behind, last, strict=True):
            if gram >= 0:
                behind[gram] = position
        for length in range(LONGEST_MATCH - 1, 0, -1):
            shorter = last[length - 1]
            last[length] = -1 if shorter < 0 else shorter << _SHIFT | token
        last[0] = token
        self._tokens.append(token)

    def match(self) -> tuple[int, int]:
        """Return (length of the longest match, position of what followed it); (0, 0): none."""
        for length in range(LONGEST_MATCH, 0, -1):
            position = self._behind[length - 1].get(self._last[length - 1])
            if position is not None:
                return length, position
        return 0, 0

    def continuation(self, position: int, num_tokens: int) -> list[int]:
        """Return what followed at `position`; past the end it repeats, as a loop would."""
        known = self._tokens
        period = len(known) - position
        return [known[position + i % period] for i in range(num_tokens)]


class _Plain:
    """Steps without drafts of one number of sequences."""

    __slots__ = ("mean_s", "num_drafted", "num_seen")

    def __init__(self) -> None:
        self.mean_s = 0.0
        self.num_seen = 0
        self.num_drafted = 0  # steps with drafts since the last one without

    def observe(self, elapsed_s: float) -> None:
        # A step that was interrupted is no measure: it counts as twice the usual at most.
        usual_s = min(elapsed_s, 2 * self.mean_s) if self.num_seen else elapsed_s
        self.num_seen += 1
        self.num_drafted = 0
        self.mean_s += max(_WEIGHT, 1 / self.num_seen) * (usual_s - self.mean_s)


class RowCost:
    """What a draft adds to the time of a step, as a part of that time, measured as steps go by.

    Where every step carries drafts there is nothing to compare with, so now and then one is made to
    carry none: `takes_plain` says when.
    """

    def __init__(self) -> None:
        self._plain: dict[int, _Plain] = {}  # by number of sequences
        self._num_refused = 0  # drafts to leave out, so that the next step carries none
        self.value = _UNKNOWN_COST

    def observe(self, num_sequences: int, num_drafts: int, elapsed_s: float) -> None:
        """Learn from a step of decodes only."""
        plain = self._plain.setdefault(num_sequences, _Plain())
        self._num_refused = 0
        if not num_drafts:
            plain.observe(elapsed_s)
            return
        if plain.mean_s:
            cost = (elapsed_s / plain.mean_s - 1) / num_drafts
            self.value += _WEIGHT * (min(max(cost, 0.0), 1.0) - self.value)
        plain.num_drafted += 1
        if plain.num_drafted >= (_PLAIN_SOON if plain.num_seen < _PLAIN_KNOWN else _PLAIN_LATER):
            plain.num_drafted = 0
            self._num_refused = num_sequences

    def takes_plain(self) -> bool:
        """Whether the next sequence's drafts are to be left out for the sake of a measure."""
        if not self._num_refused:
            return False
        self._num_refused -= 1
        return True

    def pays_from(self, num_sequences: int) -> float:
        """Return the rate of acceptance that is worth its time.

        A step makes a token for each sequence: one more is worth that part of a step.
        """
        return min(max(self.value * num_sequences, _PAYS_FROM), _PAYS_SURELY)


class DraftLength:
    """How many tokens of one sequence to guess: more while all come true, none while few do."""

    __slots__ = ("_limit", "_next_pause", "_rate", "length", "resumes_at")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.length = limit
        self.resumes_at = 0  # no guesses before the sequence has so many tokens
        self._rate = _START_RATE  # running mean of the accepted part of each draft
        self._next_pause = _FIRST_PAUSE

    def observe(
        self, num_drafted: int, num_accepted: int, num_tokens: int, pays_from: float
    ) -> None:
        """Learn from one draft of a sequence that now has `num_tokens` tokens.

        `pays_from` is the part that must come true for drafts to pay.
        """
        if num_accepted == num_drafted:
            self.length = min(self._limit, max(self.length, num_drafted + 1))
        else:
            self.length = max(1, num_accepted)
        weight = 1 - (1 - _WEIGHT) ** num_drafted
        self._rate += weight * (num_accepted / num_drafted - self._rate)
        if self._rate < pays_from:
            self.resumes_at = num_tokens + self._next_pause
            self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)
            self._rate, self.length = max(pays_from, _START_RATE / 2), 1
        elif self._rate > _START_RATE:
            self._next_pause = _FIRST_PAUSE


class _Drafting:
    __slots__ = ("index", "length")

    def __init__(self, limit: int) -> None:
        self.index = NgramIndex()
        self.length = DraftLength(limit)


class NgramDrafter:
    """Implements `plan.Drafter` by looking up the last tokens in the sequence itself."""

    def __init__(self, num_draft_tokens: int) -> None:
        self._limit = num_draft_tokens
        self.cost = RowCost()
        self._num_sequences = 1  # in the last step
        self._drafting: dict[str, _Drafting] = {}

    def __len__(self) -> int:
        return len(self._drafting)

    def propose(self, seq: Sequence, limit: int) -> list[int]:
        """Return up to `limit` tokens that followed the last ones of `seq` when they stood before.

        A short match is worth a short guess: it is no longer than the match, except for the
        longest that is looked for.
        """
        found = self._drafting.get(seq.seq_id)
        if found is None:
            found = self._drafting[seq.seq_id] = _Drafting(self._limit)
        index, length = found.index, found.length
        if len(seq.token_ids) < length.resumes_at:
            return []
        index.extend(seq.token_ids[len(index) : len(index) + _NOTED_AT_ONCE])
        if len(index) < len(seq.token_ids):
            return []
        num_matched, position = index.match()
        if not num_matched or self.cost.takes_plain():
            return []
        wanted = length.length if num_matched == LONGEST_MATCH else min(num_matched, length.length)
        return index.continuation(position, min(wanted, limit))

    def observe(self, seq_id: str, num_drafted: int, num_accepted: int) -> None:
        """Learn how many of the last guesses came true."""
        found = self._drafting[seq_id]
        num_tokens = len(found.index) + num_accepted + 1
        pays_from = self.cost.pays_from(self._num_sequences)
        found.length.observe(num_drafted, num_accepted, num_tokens, pays_from)

    def observe_step(self, num_sequences: int, num_drafts: int, elapsed_s: float) -> None:
        """Learn what a step of decodes took."""
        self._num_sequences = num_sequences
        self.cost.observe(num_sequences, num_drafts, elapsed_s)

    def forget(self, seq_id: str) -> None:
        self._drafting.pop(seq_id, None)


class MtpDrafter:
    """Implements `plan.Drafter` with guesses that the model's prediction layer made."""

    def __init__(self, num_draft_tokens: int, max_draft_rows: int) -> None:
        """`max_draft_rows`: drafts make no step larger than this; see `SchedulerConfig`."""
        self._limit = num_draft_tokens
        self.max_draft_rows = max_draft_rows
        self.cost = RowCost()
        self._num_sequences = 1  # in the last step
        self._lengths: dict[str, DraftLength] = {}
        self._offered: dict[str, tuple[int, list[int]]] = {}
        self._num_tokens: dict[str, int] = {}  # of each sequence when it last carried guesses

    def __len__(self) -> int:
        return len(self._lengths)

    def wanted(self, seq: Sequence, num_tokens: int) -> int:
        """Return how many guesses `seq`, which now has `num_tokens` tokens, can use."""
        if not seq.can_draft:
            return 0
        length = self._lengths.setdefault(seq.seq_id, DraftLength(self._limit))
        return length.length if num_tokens >= length.resumes_at else 0

    def offer(self, seq_id: str, num_tokens: int, drafts: list[int]) -> None:
        """Note guesses for the tokens behind the first `num_tokens`."""
        self._offered[seq_id] = (num_tokens, drafts)

    def propose(self, seq: Sequence, limit: int) -> list[int]:
        """Return what was offered for just this length of `seq`."""
        num_tokens, drafts = self._offered.get(seq.seq_id, (0, []))
        if num_tokens != len(seq.token_ids) or not drafts or self.cost.takes_plain():
            return []
        self._num_tokens[seq.seq_id] = num_tokens
        return drafts[:limit]

    def observe(self, seq_id: str, num_drafted: int, num_accepted: int) -> None:
        """Learn how many of the last guesses came true."""
        num_tokens = self._num_tokens[seq_id] + num_accepted + 1
        pays_from = self.cost.pays_from(self._num_sequences)
        self._lengths[seq_id].observe(num_drafted, num_accepted, num_tokens, pays_from)

    def observe_step(self, num_sequences: int, num_drafts: int, elapsed_s: float) -> None:
        """Learn what a step of decodes took."""
        self._num_sequences = num_sequences
        self.cost.observe(num_sequences, num_drafts, elapsed_s)

    def forget(self, seq_id: str) -> None:
        for known in (self._lengths, self._offered, self._num_tokens):
            known.pop(seq_id, None)
