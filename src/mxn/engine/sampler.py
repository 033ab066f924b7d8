"""Turns logits into tokens: penalties, filters, random choice and log-probabilities.

The rules themselves are ops (`choose`, `token_logprobs`); here is only which row wants which rule,
so that nobody pays for what no row asked. Knows no models, pages, text.
Start at `Sampler.sample`. Shape letters: R rows, V vocabulary.

A token depends on its own logits, params, seed and position only, never on other rows of a step.
"""

from __future__ import annotations

import secrets
from copy import copy
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from mxn.engine.grammar import GrammarState, masks
from mxn.engine.protocol import SamplingParams, TokenLogprob
from mxn.kernels.params import ChoiceRule, LogitEdit

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.kernels.registry import Ops

GREEDY_BELOW = 1e-5  # temperatures under this would overflow float32 logits, and mean greedy
_GREEDY = ChoiceRule()


class TokenCounts:
    """Distinct tokens of a sequence and how often each was generated; grows by one token a step."""

    __slots__ = ("_counts", "_ids", "_index", "_size")

    def __init__(self, prompt_ids: list[int]) -> None:
        distinct = list(dict.fromkeys(prompt_ids))
        self._size = len(distinct)
        self._ids = np.zeros(max(64, 2 * self._size), dtype=np.int64)
        self._ids[: self._size] = distinct
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._index = {token: i for i, token in enumerate(distinct)}

    def add(self, token_id: int) -> None:
        """Count one generated token."""
        at = self._index.setdefault(token_id, self._size)
        if at == self._size:
            if self._size == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[at] = token_id
            self._size += 1
        self._counts[at] += 1

    def copy(self) -> TokenCounts:
        """Return counts that grow apart from these."""
        other = copy(self)
        other._ids, other._counts = self._ids.copy(), self._counts.copy()
        other._index = dict(self._index)
        return other

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: self._size]

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: self._size]


class SamplingState:
    """What the sampler remembers of one sequence. Call `append` for each token that was kept."""

    __slots__ = (
        "_counts",
        "_num_ahead",
        "_plain_from",
        "eos_ids",
        "grammar",
        "output_ids",
        "params",
        "seed",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: list[int],
        *,
        eos_ids: tuple[int, ...] = (),
        index: int = 0,
        grammar: GrammarState | None = None,
    ) -> None:
        """`index` tells apart the `n` answers of one request: each draws its own numbers."""
        self.params = params
        self.eos_ids = eos_ids
        self.grammar = grammar
        self.output_ids: list[int] = []
        self._num_ahead = 0
        seed = secrets.randbits(64) if params.seed is None else params.seed
        self.seed = _mix(seed + index * 0x632BE59BD9B4E019)
        self._counts: TokenCounts | None = None
        if self.wants_penalties:
            # Repetition looks at prompt and output, the other two at the output only.
            self._counts = TokenCounts(prompt_ids if params.repetition_penalty != 1 else [])
        self._plain_from = params.min_tokens if self._may_be_plain() else None

    def append(self, token_id: int) -> None:
        """Take note that `token_id` became part of the output."""
        self.output_ids.append(token_id)
        if self.grammar is not None:
            self.grammar.consume(token_id)
        if self._counts is not None:
            self._counts.add(token_id)

    def after(self, token_id: int) -> SamplingState:
        """Return the state as it would be with one more token, for a row behind a draft.

        Its `output_ids` are those of this state. Not for states with a grammar.
        """
        assert self.grammar is None, "a grammar cannot look ahead"
        ahead = copy(self)
        ahead._num_ahead += 1
        if self._counts is not None:
            ahead._counts = self._counts.copy()
            ahead._counts.add(token_id)
        return ahead

    @property
    def num_output(self) -> int:
        """Tokens of the output, with those looked ahead."""
        return len(self.output_ids) + self._num_ahead

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    @property
    def wants_penalties(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0

    def _may_be_plain(self) -> bool:
        p = self.params
        is_bare = not p.logit_bias and p.logprobs is None and self.grammar is None
        return self.is_greedy and is_bare and self._counts is None

    @property
    def is_plain(self) -> bool:
        """The logits are used as they are, and only their order counts."""
        return self._plain_from is not None and self.num_output >= self._plain_from

    @property
    def rule(self) -> ChoiceRule:
        """Return how the next token is chosen once its logits are penalized."""
        p = self.params
        if self.is_greedy:
            return _GREEDY
        return ChoiceRule(p.temperature, self.uniform(), max(0, p.top_k), p.top_p, p.min_p)

    def edits(self, row: int) -> list[LogitEdit]:
        """Return what becomes of the logits of `row` before: penalties first, then biases."""
        found = []
        penalties = self.penalties()
        if penalties is not None and len(penalties[0]):
            ids, repetition, subtract = penalties
            found.append(LogitEdit(row, ids, repetition, subtract.astype(np.float32)))
        if bias := self.bias():
            ids = np.fromiter(bias, np.int64)
            found.append(LogitEdit(row, ids, 1.0, -np.fromiter(bias.values(), np.float32)))
        return found

    def uniform(self) -> float:
        """Return the random number in [0, 1) of the next token; 24 bits, exact in float32."""
        return (_mix(self.seed + self.num_output) >> 40) / (1 << 24)

    def penalties(self) -> tuple[np.ndarray, float, np.ndarray] | None:
        """Return (token ids, repetition penalty, what to subtract from each), or None."""
        if self._counts is None:
            return None
        p, counts = self.params, self._counts.counts
        subtract = p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
        return self._counts.ids, p.repetition_penalty, subtract

    def bias(self) -> dict[int, float]:
        """Return what is added to which logit: `logit_bias`, and -inf for what may not end yet."""
        p = self.params
        if self.num_output >= p.min_tokens or self.grammar is not None:
            return p.logit_bias  # a grammar may leave nothing but the end
        return p.logit_bias | dict.fromkeys((*self.eos_ids, *p.stop_token_ids), float("-inf"))


class SampledToken(NamedTuple):
    """`token_id` is -1 if the logits were not numbers, or nothing was allowed: fail the request."""

    token_id: int
    logprob: TokenLogprob | None = None

    @property
    def is_broken(self) -> bool:
        return self.token_id < 0


class Sampler:
    """Chooses tokens on one device."""

    def __init__(self, ops: Ops, device: torch.device, vocab_size: int) -> None:
        self._ops = ops
        self._device = torch.device(device)
        self._vocab_size = vocab_size

    def sample(self, logits_RV: Tensor, requests: list[SamplingState]) -> list[SampledToken]:
        """Return one token for each row. `logits_RV` is float32 and stays as it is."""
        choose = self._ops.choose
        if all([state.is_plain for state in requests]):
            return [SampledToken(token) for token in choose(logits_RV, self._vocab_size)]
        logits_RV = self._allowed(logits_RV, requests)
        rules = [state.rule for state in requests]
        edits = [edit for row, state in enumerate(requests) for edit in state.edits(row)]
        ids = choose(logits_RV, self._vocab_size, rules, edits)
        return self._with_logprobs(logits_RV[:, : self._vocab_size], ids, requests)

    @torch.inference_mode()
    def prompt_logprobs(
        self, logits_TV: Tensor, next_ids: list[int], num_top: int
    ) -> list[TokenLogprob]:
        """Return the log-probability of each next token under its row of logits."""
        ids_T = torch.tensor(next_ids, device=self._device)
        found = self._ops.token_logprobs(logits_TV[:, : self._vocab_size], ids_T, num_top)
        return _token_logprobs(next_ids, found, [num_top] * len(next_ids))

    def _allowed(self, logits_RV: Tensor, requests: list[SamplingState]) -> Tensor:
        """Return logits that are -inf where a row's grammar forbids a token."""
        rows = [row for row, state in enumerate(requests) if state.grammar is not None]
        if not rows:
            return logits_RV
        logits_RV = logits_RV[:, : self._vocab_size]
        states = [state.grammar for state in requests if state.grammar is not None]
        allowed_GV = torch.from_numpy(masks(states, self._vocab_size)).to(self._device)
        changed_RV = logits_RV.clone()
        rows_G = torch.tensor(rows, device=self._device)
        kept_GV = changed_RV[rows_G].masked_fill_(~allowed_GV, float("-inf"))
        changed_RV[rows_G] = kept_GV
        return changed_RV

    def _with_logprobs(
        self, logits_RV: Tensor, ids: list[int], requests: list[SamplingState]
    ) -> list[SampledToken]:
        wanted = [
            row
            for row, state in enumerate(requests)
            if state.params.logprobs is not None and ids[row] >= 0
        ]
        if not wanted:
            return [SampledToken(token) for token in ids]
        num_tops = [requests[row].params.logprobs or 0 for row in wanted]
        chosen = [ids[row] for row in wanted]
        rows_W, ids_W = torch.tensor([wanted, chosen], device=self._device)
        found = self._ops.token_logprobs(logits_RV[rows_W], ids_W, max(num_tops))
        by_row = dict(zip(wanted, _token_logprobs(chosen, found, num_tops), strict=True))
        return [SampledToken(token, by_row.get(row)) for row, token in enumerate(ids)]


def _token_logprobs(
    ids: list[int], found: tuple[Tensor, Tensor, Tensor], num_tops: list[int]
) -> list[TokenLogprob]:
    chosen, tops, top_ids = (part.tolist() for part in found)
    return [
        TokenLogprob(token, logprob, list(zip(best_ids[:n], best[:n], strict=True)))
        for token, logprob, best, best_ids, n in zip(
            ids, chosen, tops, top_ids, num_tops, strict=True
        )
    ]


def _mix(state: int) -> int:
    """Return 64 well mixed bits of `state`. Source: Steele et al. 2014, SplitMix64."""
    z = (state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)
