"""The sampler: each rule against transformers, seeds across batches, and the distribution drawn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mxn.engine.protocol import SamplingParams
from mxn.engine.sampler import Sampler, SamplingState
from mxn.kernels.ops.filter_logits.naive import filter_logits
from mxn.kernels.ops.penalize.naive import penalize
from mxn.kernels.registry import Ops, kernels_of
from mxn.kernels.tune import Table

CPU = torch.device("cpu")
VOCAB = 97
EOS = 5


@pytest.fixture(scope="module", params=["torch", "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    reason = kernels_of("choose")[request.param].reject_reason("x86-test", "float32")
    if reason:
        pytest.skip(reason)
    pins = {"choose": request.param}
    ops = Ops(CPU, "x86-test", torch.float32, Table.open("x86-test"), pins)
    for name in ("choose", "token_logprobs"):
        setattr(ops, name, ops._choose(name))
    return ops


@pytest.fixture(scope="module")
def sampler(ops: Ops) -> Sampler:
    return Sampler(ops, CPU, VOCAB)


def logits_of(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def state_of(prompt: list[int], output: list[int], **params: object) -> SamplingState:
    state = SamplingState(SamplingParams(**params), prompt, eos_ids=(EOS,))  # type: ignore[arg-type]
    for token in output:
        state.append(token)
    return state


class Recorder:
    """Ops that keep what `choose` was given."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.given: tuple[Any, ...] = ()

    def __getattr__(self, name: str) -> object:
        return getattr(self._ops, name)

    def choose(self, *args: Any) -> list[int]:
        self.given = args
        return self._ops.choose(*args)


def drawn_from(ops: Ops, logits: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """Return the logits that the token is drawn from: what the truth of the op makes of a call."""
    recorder = Recorder(ops)
    Sampler(recorder, CPU, logits.shape[1]).sample(logits, [state])  # type: ignore[arg-type]
    given, num_tokens, [rule], edits = recorder.given
    edited = given[:, :num_tokens].clone()
    for row, ids, repetition, subtract in edits:
        pairs = (torch.full((len(ids),), row), torch.from_numpy(ids))
        penalize(edited, *pairs, torch.full((len(ids),), repetition), torch.from_numpy(subtract))
    numbers = (rule.temperature, rule.top_k, rule.top_p, rule.min_p)
    return filter_logits(edited, *(torch.tensor([number]) for number in numbers))[0]


PROMPT, OUTPUT = [3, 9, 9, 40], [9, 11, 60, 11]
RULES = [
    ({}, []),
    ({"temperature": 0.3}, [TemperatureLogitsWarper(0.3)]),
    ({"top_k": 7}, [TopKLogitsWarper(7)]),
    ({"top_k": 1000}, [TopKLogitsWarper(1000)]),
    ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    ({"top_p": 0.01}, [TopPLogitsWarper(0.01)]),
    ({"min_p": 0.07}, [MinPLogitsWarper(0.07)]),
    ({"repetition_penalty": 1.3}, [RepetitionPenaltyLogitsProcessor(1.3)]),
    ({"repetition_penalty": 0.8}, [RepetitionPenaltyLogitsProcessor(0.8)]),
    ({"logit_bias": {4: 3.5, 9: -100.0}}, [SequenceBiasLogitsProcessor({(4,): 3.5, (9,): -100.0})]),
    ({"min_tokens": 5}, [MinLengthLogitsProcessor(len(PROMPT) + 5, EOS)]),
    ({"min_tokens": 4}, []),
    (
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1},
        [
            RepetitionPenaltyLogitsProcessor(1.1),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ],
    ),
]


@pytest.mark.parametrize(("params", "processors"), RULES, ids=lambda value: str(value)[:60])
def test_rule_leaves_what_transformers_leaves(
    params: dict[str, object], processors: list[object], ops: Ops
) -> None:
    for seed in range(5):
        logits = logits_of(1, seed)
        want = LogitsProcessorList(processors)(torch.tensor([PROMPT + OUTPUT]), logits.clone())
        got = drawn_from(ops, logits, state_of(PROMPT, OUTPUT, seed=1, **params))
        assert torch.equal(want.isinf(), got.isinf()), "other tokens are allowed"
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_frequency_and_presence_look_at_the_output_only(ops: Ops) -> None:
    logits = logits_of(1)
    state = state_of(PROMPT, OUTPUT, frequency_penalty=0.5, presence_penalty=0.25)
    want = logits.clone()
    for token, count in ((9, 1), (11, 2), (60, 1)):
        want[0, token] -= 0.5 * count + 0.25
    torch.testing.assert_close(drawn_from(ops, logits, state), want)


def test_logits_stay_as_they_are(sampler: Sampler) -> None:
    logits = logits_of(2)
    before = logits.clone()
    sampler.sample(logits, [state_of([1], [2], repetition_penalty=2.0, top_p=0.5)] * 2)
    assert torch.equal(logits, before)


def test_greedy_takes_the_best_token_and_nothing_else(sampler: Sampler) -> None:
    logits = logits_of(4)
    tokens = sampler.sample(logits, [state_of([1], [], temperature=0.0)] * 4)
    assert [t.token_id for t in tokens] == logits.argmax(1).tolist()
    assert all(t.logprob is None for t in tokens)


def test_greedy_obeys_penalty_bias_and_min_tokens(sampler: Sampler) -> None:
    logits = torch.zeros(4, VOCAB)
    logits[:, EOS], logits[:, 7], logits[:, 8], logits[:, 9] = 9.0, 8.0, 7.9, 1.0
    tokens = sampler.sample(
        logits,
        [
            state_of([1], [], temperature=0.0),
            state_of([1], [2], temperature=0.0, min_tokens=2),
            state_of([1], [2], temperature=0.0, min_tokens=2, stop_token_ids=(7,)),
            state_of([EOS, 7], [], temperature=0.0, repetition_penalty=3.0, logit_bias={9: 50.0}),
        ],
    )
    assert [t.token_id for t in tokens] == [EOS, 7, 8, 9]


def test_a_forbidden_end_stays_forbidden_under_a_bias(sampler: Sampler) -> None:
    state = state_of([1], [], min_tokens=1, logit_bias={EOS: 100.0}, temperature=0.0)
    assert sampler.sample(logits_of(1), [state])[0].token_id != EOS


def test_seed_gives_the_same_tokens_in_any_batch(sampler: Sampler) -> None:
    """Alone, among greedy rows, among rows that need more candidates: the token stays."""
    logits = logits_of(20, seed=3)
    mine = {"temperature": 1.1, "top_p": 0.95, "seed": 1234}
    others = [
        {"temperature": 0.0},
        {"temperature": 2.0, "top_k": 90},
        {"min_p": 0.1, "seed": 9},
        {"repetition_penalty": 1.5, "logprobs": 3},
    ]
    for step in range(20):
        output = list(range(step))
        alone = sampler.sample(logits[step : step + 1], [state_of([1], output, **mine)])[0]
        for other in others:
            rows = torch.stack((logits[0], logits[step], logits[7]))
            states = [state_of([1], [2], **other), state_of([1], output, **mine)]
            states.append(state_of([4], [], **other))
            assert sampler.sample(rows, states)[1].token_id == alone.token_id


def test_the_answers_of_one_request_differ(sampler: Sampler) -> None:
    logits = torch.zeros(16, VOCAB)
    params = SamplingParams(seed=7)
    states = [SamplingState(params, [1], index=i) for i in range(16)]
    assert len({t.token_id for t in sampler.sample(logits, states)}) > 8


def test_without_a_seed_two_requests_differ(sampler: Sampler) -> None:
    states = [state_of([1], []) for _ in range(16)]
    assert len({t.token_id for t in sampler.sample(torch.zeros(16, VOCAB), states)}) > 8


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.6}, {"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.05}], ids=str
)
def test_tokens_come_with_the_probabilities_of_the_filtered_softmax(
    params: dict[str, object], sampler: Sampler, ops: Ops
) -> None:
    """Chi-square over 8000 draws; the limit is six standard deviations over its mean."""
    draws = 8000
    logits = logits_of(1, seed=11)
    states = [state_of([1], [], seed=s, **params) for s in range(draws)]
    tokens = sampler.sample(logits.expand(draws, -1), states)
    counts = torch.bincount(torch.tensor([t.token_id for t in tokens]), minlength=VOCAB).double()
    probability = drawn_from(ops, logits, states[0]).double().softmax(1)[0]
    assert counts[probability == 0].sum() == 0
    expected = probability * draws
    is_common = expected >= 5
    statistic = ((counts - expected)[is_common] ** 2 / expected[is_common]).sum()
    freedom = int(is_common.sum()) - 1
    assert statistic < freedom + 6 * math.sqrt(2 * max(freedom, 1))


def test_logprobs_are_of_the_model_not_of_the_penalties(sampler: Sampler) -> None:
    logits = logits_of(3)
    states = [
        state_of([1], [], temperature=0.0, logprobs=2, logit_bias={4: 100.0}),
        state_of([1], []),
        state_of([1], [], temperature=0.0, logprobs=0),
    ]
    tokens = sampler.sample(logits, states)
    want = logits.log_softmax(1)
    first = tokens[0].logprob
    assert first is not None
    assert tokens[0].token_id == 4
    assert first.logprob == float(want[0, 4])
    best = want[0].topk(2)
    assert first.top == list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    assert tokens[1].logprob is None
    assert tokens[2].logprob is not None
    assert tokens[2].logprob.top == []


def test_chosen_logprob_is_the_very_float_of_the_top_list(sampler: Sampler) -> None:
    tokens = sampler.sample(logits_of(8), [state_of([1], [], temperature=0.0, logprobs=5)] * 8)
    for token in tokens:
        assert token.logprob is not None
        assert token.logprob.top[0] == (token.token_id, token.logprob.logprob)


def test_prompt_logprobs_score_the_next_token(sampler: Sampler) -> None:
    logits = logits_of(3)
    found = sampler.prompt_logprobs(logits, [4, 5, 6], 1)
    assert [f.logprob for f in found] == logits.log_softmax(1)[range(3), [4, 5, 6]].tolist()
    assert [f.top[0][0] for f in found] == logits.argmax(1).tolist()


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"logprobs": 1}])
def test_broken_logits_break_their_own_row_only(
    params: dict[str, object], sampler: Sampler
) -> None:
    logits = logits_of(3)
    logits[1, 50] = float("nan")
    tokens = sampler.sample(logits, [state_of([1], [], **params) for _ in range(3)])
    assert [t.is_broken for t in tokens] == [False, True, False]


def test_penalty_counts_grow_past_their_first_size() -> None:
    state = state_of([1, 2], [*range(500), 7], frequency_penalty=1.0, repetition_penalty=1.1)
    found = state.penalties()
    assert found is not None
    ids, _, subtract = found
    assert dict(zip(ids.tolist(), subtract.tolist(), strict=True)) == {
        token: 2.0 if token == 7 else 1.0 for token in range(500)
    }
