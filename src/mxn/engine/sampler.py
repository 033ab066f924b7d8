"""Turns logits into tokens: penalties, filters, random choice and log-probabilities.

The rules themselves are ops (`penalize`, `filter_logits`, `sample`, `token_logprobs`); here is only
which row wants which rule, so that nobody pays for what no row asked. Knows no models, pages, text.
Start at `Sampler.sample`. Shape letters: R rows, V vocabulary, M (row, token) pairs.

A token depends on its own logits, params, seed and position only, never on other rows of a step.
"""

from __future__ import annotations

import secrets
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mxn.engine.grammar import GrammarState, masks
from mxn.engine.protocol import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.kernels.registry import Ops

GREEDY_BELOW = 1e-5  # temperatures under this would overflow float32 logits, and mean greedy
_FEW_CANDIDATES = 256  # nearly always hold all that top-p or min-p keep
_MANY_CANDIDATES = 8192
_TIES = 8  # room for ties behind the k-th candidate


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

    __slots__ = ("_counts", "_num_ahead", "eos_ids", "grammar", "output_ids", "params", "seed")

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

    @property
    def is_plain(self) -> bool:
        """The logits are used as they are, and only their order counts."""
        return (
            self.is_greedy
            and self._counts is None
            and not self.params.logit_bias
            and self.params.logprobs is None
            and self.num_output >= self.params.min_tokens
        )

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


@dataclass(frozen=True, slots=True)
class SampledToken:
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

    @torch.inference_mode()
    def sample(self, logits_RV: Tensor, requests: list[SamplingState]) -> list[SampledToken]:
        """Return one token for each row. `logits_RV` is float32 and stays as it is."""
        logits_RV = self._allowed(logits_RV[:, : self._vocab_size], requests)
        if all(state.is_plain for state in requests):
            return [SampledToken(token) for token in self._ops.argmax(logits_RV).tolist()]
        changed_RV = self._with_penalties(logits_RV, requests)
        ids_R = self._choose(changed_RV, requests)
        return self._with_logprobs(logits_RV, ids_R, requests)

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
        states = [state.grammar for state in requests if state.grammar is not None]
        allowed_GV = torch.from_numpy(masks(states, self._vocab_size)).to(self._device)
        changed_RV = logits_RV.clone()
        rows_G = torch.tensor(rows, device=self._device)
        kept_GV = changed_RV[rows_G].masked_fill_(~allowed_GV, float("-inf"))
        changed_RV[rows_G] = kept_GV
        return changed_RV

    def _with_penalties(self, logits_RV: Tensor, requests: list[SamplingState]) -> Tensor:
        penalties = [(row, state.penalties()) for row, state in enumerate(requests)]
        pairs = [(row, *found) for row, found in penalties if found and len(found[0])]
        biases = [(row, bias) for row, state in enumerate(requests) if (bias := state.bias())]
        if not pairs and not biases:
            return logits_RV
        changed_RV = logits_RV.clone()
        if pairs:
            self._penalize(changed_RV, pairs)
        if biases:
            self._penalize(
                changed_RV,
                [
                    (row, np.fromiter(bias, np.int64), 1.0, -np.fromiter(bias.values(), np.float32))
                    for row, bias in biases
                ],
            )
        return changed_RV

    def _penalize(
        self, logits_RV: Tensor, pairs: list[tuple[int, np.ndarray, float, np.ndarray]]
    ) -> None:
        sizes = [len(ids) for _, ids, _, _ in pairs]
        rows_M = np.repeat([row for row, _, _, _ in pairs], sizes)
        repetition_M = np.repeat(np.array([rate for _, _, rate, _ in pairs], np.float32), sizes)
        ids_M = np.concatenate([ids for _, ids, _, _ in pairs])
        subtract_M = np.concatenate([part for _, _, _, part in pairs]).astype(np.float32)
        arrays = (rows_M, ids_M, repetition_M, subtract_M)
        self._ops.penalize(logits_RV, *(torch.from_numpy(a).to(self._device) for a in arrays))

    def _choose(self, logits_RV: Tensor, requests: list[SamplingState]) -> list[int]:
        drawn = [row for row, state in enumerate(requests) if not state.is_greedy]
        if not drawn:
            return self._ops.argmax(logits_RV).tolist()
        if len(drawn) == len(requests):
            return self._draw(logits_RV, requests)
        ids_R = self._ops.argmax(logits_RV).tolist()
        rows = torch.tensor(drawn, device=self._device)
        found = self._draw(logits_RV[rows], [requests[row] for row in drawn])
        for row, token in zip(drawn, found, strict=True):
            ids_R[row] = token
        return ids_R

    def _draw(self, logits_RV: Tensor, requests: list[SamplingState]) -> list[int]:
        """Return a random token for each row; rows without a filter need no candidates."""
        is_open = [not any(_rules([state.params])) for state in requests]
        if all(is_open):
            return self._draw_open(logits_RV, requests)
        if not any(is_open):
            return self._draw_filtered(logits_RV, requests)
        ids = [-1] * len(requests)
        for wanted, draw in ((True, self._draw_open), (False, self._draw_filtered)):
            rows = [row for row, found in enumerate(is_open) if found is wanted]
            some_RV = logits_RV[torch.tensor(rows, device=self._device)]
            for row, token in zip(rows, draw(some_RV, [requests[r] for r in rows]), strict=True):
                ids[row] = token
        return ids

    def _draw_open(self, logits_RV: Tensor, requests: list[SamplingState]) -> list[int]:
        numbers = [[state.params.temperature, state.uniform()] for state in requests]
        temperature_R, uniform_R = torch.tensor(numbers, device=self._device).unbind(1)
        return self._ops.sample(logits_RV / temperature_R.unsqueeze(1), uniform_R).tolist()

    def _draw_filtered(self, logits_RV: Tensor, requests: list[SamplingState]) -> list[int]:
        """Try with few candidates; the rare row that needs more runs again with more."""
        ids = [-1] * len(requests)
        rows = list(range(len(requests)))
        for num_candidates in (_num_candidates(requests), _MANY_CANDIDATES, None):
            found, is_exact = self._draw_once(
                logits_RV, [requests[row] for row in rows], num_candidates
            )
            for row, token in zip(rows, found, strict=True):
                ids[row] = token
            again = [i for i, exact in enumerate(is_exact) if not exact]
            if not again:
                break
            rows = [rows[i] for i in again]
            logits_RV = logits_RV[torch.tensor(again, device=self._device)]
        return ids

    def _draw_once(
        self, logits_RV: Tensor, requests: list[SamplingState], num_candidates: int | None
    ) -> tuple[list[int], list[int]]:
        """Return a token for each row, and for which rows the candidates were enough."""
        params = [state.params for state in requests]
        numbers = [
            [p.temperature, s.uniform(), p.top_p, p.min_p]
            for p, s in zip(params, requests, strict=True)
        ]
        packed = torch.tensor(numbers, device=self._device)
        temperature_R, uniform_R, top_p_R, min_p_R = packed.unbind(1)
        has_k, has_p, has_m = _rules(params)
        kept_RC, ids_RC, is_exact_R = self._ops.filter_logits(
            logits_RV,
            temperature_R,
            torch.tensor([p.top_k for p in params], device=self._device) if has_k else None,
            top_p_R if has_p else None,
            min_p_R if has_m else None,
            num_candidates,
        )
        picked_R = self._ops.sample(kept_RC, uniform_R)
        ids_R = ids_RC.gather(1, picked_R.clamp_min(0).unsqueeze(1)).squeeze(1)
        ids_R = torch.where(picked_R < 0, -1, ids_R)
        ids, is_exact = torch.stack((ids_R, is_exact_R.to(ids_R.dtype))).tolist()
        return ids, is_exact

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


def _rules(params: list[SamplingParams]) -> tuple[bool, bool, bool]:
    return (
        any(p.top_k > 0 for p in params),
        any(p.top_p < 1 for p in params),
        any(p.min_p > 0 for p in params),
    )


def _num_candidates(requests: list[SamplingState]) -> int:
    """Return how many of a row's best logits should do to decide its filters."""
    params = [state.params for state in requests]
    most = 1 + max(p.top_k for p in params) + _TIES
    return max(most, _FEW_CANDIDATES) if any(p.top_k <= 0 for p in params) else most


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
