"""The loop of the encoders: order, batches by length, bad sequences, faults."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mxn.engine.encoder import EncoderCore
from mxn.engine.protocol import Cancel, Encode, Encoded, Failed, Generate, ModelInfo, SamplingParams
from mxn.engine.testing import TinyEncoder


@pytest.fixture
def model(engine_device):
    return TinyEncoder(engine_device)


def make_core(model, max_batch_tokens=32) -> EncoderCore:
    info = ModelInfo(
        kind="embedder", family="tiny", path="tiny", device="cpu", chip="test", dtype="float32",
        max_context=model.max_positions, vocab_size=model.vocab_size, num_parameters=0,
    )  # fmt: skip
    return EncoderCore(model, info, max_batch_tokens=max_batch_tokens)


def run_dry(core) -> dict[str, object]:
    replies = {}
    while core.has_work:
        for reply in core.step():
            assert reply.request_id not in replies, "a request is answered once"
            replies[reply.request_id] = reply
    return replies


def rows_of(encoded: Encoded) -> np.ndarray:
    return np.stack([np.frombuffer(row, dtype="<f4") for row in encoded.rows])


def some_sequences(rng, count) -> list[list[int]]:
    return [[rng.randrange(258) for _ in range(rng.randint(1, 40))] for _ in range(count)]


def test_rows_come_in_the_order_of_the_caller(model):
    core, rng = make_core(model), random.Random(1)
    requests = {f"r{i}": some_sequences(rng, rng.randint(1, 12)) for i in range(8)}
    for request_id, sequences in requests.items():
        assert core.handle(Encode(request_id=request_id, sequences=sequences)) == []
    replies = run_dry(core)
    assert set(replies) == set(requests)
    for request_id, sequences in requests.items():
        alone = np.stack([model.encode([s])[0].cpu().numpy() for s in sequences])
        np.testing.assert_allclose(rows_of(replies[request_id]), alone, rtol=1e-6)
        assert replies[request_id].prompt_tokens == sum(map(len, sequences))


def test_a_batch_keeps_the_budget_longest_first(model):
    core = make_core(model, max_batch_tokens=40)
    core.handle(Encode(request_id="r", sequences=[[1] * n for n in (1, 10, 2, 9, 1, 60, 10)]))
    run_dry(core)
    assert model.batches == [[60], [10, 10, 9, 2], [1, 1]]


def test_token_types_reach_the_model(model):
    core = make_core(model)
    core.handle(Encode(request_id="a", sequences=[[1, 2]], token_types=[[0, 1]]))
    core.handle(Encode(request_id="b", sequences=[[1, 2]]))
    replies = run_dry(core)
    assert not np.allclose(rows_of(replies["a"]), rows_of(replies["b"]))


@pytest.mark.parametrize(
    ("sequences", "code", "part"),
    [
        ([[1], []], None, "sequence 1 is empty"),
        ([[1] * 65], "context_length_exceeded", "65 tokens, the model takes at most 64"),
        ([[3, 258]], None, "token id 258 is outside the vocabulary of 258"),
        ([[-1]], None, "token id -1"),
    ],
)
def test_a_bad_sequence_is_refused_with_its_value(model, sequences, code, part):
    [failed] = make_core(model).handle(Encode(request_id="r", sequences=sequences))
    assert isinstance(failed, Failed)
    assert (failed.is_user_error, failed.code) == (True, code)
    assert part in failed.message


def test_an_encoder_does_not_generate(model):
    request = Generate(request_id="g", prompt_ids=[1], sampling=SamplingParams())
    [failed] = make_core(model).handle(request)
    assert failed.is_user_error
    assert "cannot generate" in failed.message


def test_a_cancelled_request_is_not_computed(model):
    core = make_core(model)
    core.handle(Encode(request_id="a", sequences=[[1]]))
    core.handle(Encode(request_id="b", sequences=[[2]]))
    core.handle(Cancel(request_id="a"))
    assert set(run_dry(core)) == {"b"}
    assert model.batches == [[1]]
    assert core.stats().requests_cancelled_total == 1


def test_a_sequence_that_fails_takes_only_its_request_with_it(model):
    core = make_core(model, max_batch_tokens=10)
    real = model.encode

    def fails_for_two(sequences, token_types):
        if any(2 in sequence for sequence in sequences):
            raise ZeroDivisionError("two")
        return real(sequences, token_types)

    model.encode = fails_for_two
    for i, sequence in enumerate([[1], [2], [3], [4]]):
        core.handle(Encode(request_id=f"r{i}", sequences=[sequence, [5]]))
    replies = run_dry(core)
    failed = replies.pop("r1")
    assert (failed.message, failed.is_user_error) == (
        "the model failed: ZeroDivisionError: two",
        False,
    )
    assert [type(replies[i]) for i in ("r0", "r2", "r3")] == [Encoded] * 3


def test_no_sequences_give_no_rows(model):
    [encoded] = make_core(model).handle(Encode(request_id="r", sequences=[]))
    assert encoded.rows == []
