"""Guesses by a model's prediction layer: right through pages and chunks, never in the text."""

from __future__ import annotations

import msgspec
import pytest
import torch

from mxn.engine.config import EngineConfig
from mxn.engine.local import LocalEngine
from mxn.engine.protocol import SamplingParams
from mxn.errors import UnsupportedError
from mxn.models.catalogue import shipped_dir
from support import tiny
from support.mtp import add_mtp_layer, make_predictable
from support.paged import Session

FREE = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
PROMPTS = [[5, 6, 7, 8], [9] * 23, list(range(30, 70))]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny model of random numbers, whose guesses come true by chance only."""
    directory = tmp_path_factory.mktemp("mtp")
    tiny.write("deepseek_v3", directory)
    add_mtp_layer(directory)
    return directory


@pytest.fixture(scope="module")
def predictable(tmp_path_factory):
    directory = tmp_path_factory.mktemp("predictable")
    tiny.write("deepseek_v3", directory)
    add_mtp_layer(directory)
    make_predictable(directory)
    return directory


def load(directory, speculation: str = "mtp", **settings) -> LocalEngine:
    defaults = {"page_tokens": 4, "max_batch_tokens": 16, "max_sequences": 4, "threads": 1}
    return LocalEngine.load(
        EngineConfig(
            model=str(directory), loader="mxn.engine.testing:load_bytes", device="cpu",
            speculation=speculation, **(defaults | settings),
        )
    )  # fmt: skip


def note_offers(engine: LocalEngine) -> list[tuple[str, int, list[int]]]:
    offers: list[tuple[str, int, list[int]]] = []
    drafter = engine.core._scheduler._drafter
    offer = drafter.offer

    def noted(seq_id: str, num_tokens: int, drafts: list[int]) -> None:
        offers.append((seq_id, num_tokens, drafts))
        offer(seq_id, num_tokens, drafts)

    drafter.offer = noted
    return offers


@torch.inference_mode()
def guesses(engine: LocalEngine, tokens: list[int]) -> list[int]:
    """The layer's guess at each index from 2, all computed at once."""
    model = engine.core._runner._model.decoder
    session, prediction = Session(model), Session(model)
    hidden = model.hidden(session.batch({0: tokens[:-1]}), session.cache)
    logits, _ = model.predict_after_next(
        model.final_normed(hidden), prediction.batch({0: tokens[1:]}), prediction.cache[-1]
    )
    return [-1, -1, *logits.argmax(-1).tolist()]


@pytest.mark.parametrize("which", ["directory", "predictable"])
def test_first_guesses_are_those_of_the_whole_sequence_at_once(which, request):
    engine = load(request.getfixturevalue(which))
    offers = note_offers(engine)
    answers = engine.generate(PROMPTS, FREE)
    wholes = [p + a.token_ids + [0] for p, a in zip(PROMPTS, answers, strict=True)]
    want = {f"local-{i + 1}": guesses(engine, whole) for i, whole in enumerate(wholes)}
    assert len(offers) > 20
    for seq_id, num_tokens, drafts in offers:
        assert drafts[0] == want[seq_id][num_tokens], (seq_id, num_tokens)


@pytest.mark.parametrize("which", ["directory", "predictable"])
@pytest.mark.parametrize(
    "rules",
    [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.5}, {"logprobs": 2}],
    ids=str,
)
def test_answers_are_those_without_guesses(which, rules, request):
    directory = request.getfixturevalue(which)
    sampling = msgspec.structs.replace(FREE, **rules)
    want = load(directory, "off").generate(PROMPTS, sampling)
    engine = load(directory)
    got = engine.generate(PROMPTS, sampling)
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in want]
    stats = engine.stats()
    assert stats.draft_tokens_total > 0
    assert stats.kv_pages_used == 0
    engine.core.validate()
    assert len(engine.core._scheduler._drafter) == 0


def test_a_layer_that_knows_the_answer_is_always_right_several_tokens_ahead(predictable):
    engine = load(predictable, max_draft_rows=32, page_tokens=16)
    engine.generate(PROMPTS, FREE)
    stats = engine.stats()
    assert stats.accepted_draft_tokens_total == stats.draft_tokens_total > 30
    assert stats.draft_tokens_total > 2.5 * stats.drafts_total  # by guesses made from guesses


def test_preemption_and_the_prefix_cache_keep_the_answers(directory):
    prompts = [[*range(40, 56), i] for i in range(6)]
    want = load(directory, "off").generate(prompts, FREE)
    engine = load(directory, max_context=64, kv_bytes=None, max_batch_tokens=32)
    tight = load(directory, max_context=64, kv_bytes=20 * engine_page_bytes(engine))
    for one in (engine, tight):
        for _ in range(2):
            got = one.generate(prompts, FREE)
            assert [a.token_ids for a in got] == [a.token_ids for a in want]
        assert any(answer.cached_tokens for answer in got)
    assert tight.stats().preemptions_total > 0


def engine_page_bytes(engine: LocalEngine) -> int:
    from mxn.engine.kvstore import page_bytes

    return page_bytes(engine.core._runner._model, 4)


def test_a_failing_layer_costs_guesses_only(directory, monkeypatch, caplog):
    want = load(directory, "off").generate(PROMPTS, FREE)
    engine = load(directory)

    def fails(*_):
        raise RuntimeError("no prediction today")

    monkeypatch.setattr(engine.core._runner._model.decoder, "predict_after_next", fails)
    got = engine.generate(PROMPTS, FREE)
    assert [a.token_ids for a in got] == [a.token_ids for a in want]
    assert engine.stats().draft_tokens_total == 0
    assert "no prediction today" in caplog.text


@pytest.mark.parametrize(
    ("model", "weights", "reason"),
    [
        ("mxn-shakespeare-dsv3", "plain", "this deepseek_v3 checkpoint has no prediction layer"),
        ("mxn-shakespeare-dsv3", "int8", "runs on plain weights, not on a NativeDecoder"),
    ],
)
def test_a_model_that_cannot_guess_is_refused_with_the_reason(model, weights, reason):
    config = EngineConfig(
        model=str(shipped_dir() / model), weights=weights, device="cpu", speculation="mtp",
        threads=1, max_sequences=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=reason) as caught:
        LocalEngine.load(config)
    assert "--speculation ngram" in str(caught.value.hint)
