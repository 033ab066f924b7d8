"""Guesses by a prediction layer: right through pages and chunks, never in the text.

On plain weights and on packed ones.
"""

from __future__ import annotations

import shutil

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from mxn.engine.config import EngineConfig
from mxn.engine.local import LocalEngine
from mxn.engine.protocol import SamplingParams
from mxn.errors import UnsupportedError
from mxn.kernels.native import formats
from mxn.models.catalogue import shipped_dir
from mxn.models.load import pack_model
from mxn.models.native.files import is_artifact
from support import tiny
from support.mtp import add_mtp_layer, edit_config, make_predictable
from support.paged import Session

FREE = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
WEIGHTS = ("plain", "f32", "bf16", "int8", "int4-g32")
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


def load(directory, speculation: str = "mtp", weights: str = "plain", **settings) -> LocalEngine:
    page_tokens = 4 if weights == "plain" and not is_artifact(directory) else 16
    defaults = {
        "page_tokens": page_tokens,
        "weights": weights,
        "max_batch_tokens": 16,
        "max_sequences": 4,
        "threads": 1,
    }
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
    _, normed = model.forward_hidden(session.batch({0: tokens[:-1]}), session.cache)
    logits, _ = model.predict_after_next(
        normed, prediction.batch({0: tokens[1:]}), prediction.cache[-1]
    )
    return [-1, -1, *logits.argmax(-1).tolist()]


@pytest.mark.parametrize("which", ["directory", "predictable"])
@pytest.mark.parametrize("weights", ["plain", "f32", "int8"])
def test_first_guesses_are_those_of_the_whole_sequence_at_once(which, weights, request):
    engine = load(request.getfixturevalue(which), weights=weights)
    offers = note_offers(engine)
    answers = engine.generate(PROMPTS, FREE)
    wholes = [p + a.token_ids + [0] for p, a in zip(PROMPTS, answers, strict=True)]
    want = {f"local-{i + 1}": guesses(engine, whole) for i, whole in enumerate(wholes)}
    assert len(offers) > 15
    for seq_id, num_tokens, drafts in offers:
        assert drafts[0] == want[seq_id][num_tokens], (seq_id, num_tokens)


def note_head_rows(engine: LocalEngine, monkeypatch) -> list[int]:
    """Return a list that gets the rows for which the layer's head runs, pass by pass."""
    found: list[int] = []
    decoder = engine.core._runner._model.decoder
    predict = decoder.predict_after_next

    def noted(hidden_TD, batch, cache):
        logits_RV, out_TD = predict(hidden_TD, batch, cache)
        found.append(len(logits_RV))
        return logits_RV, out_TD

    monkeypatch.setattr(decoder, "predict_after_next", noted)
    return found


@pytest.mark.parametrize("weights", ["plain", "int8"])
def test_no_guess_is_made_that_no_step_has_room_for(predictable, weights, monkeypatch):
    engine = load(predictable, weights=weights, max_draft_rows=4)
    head_rows, offers = note_head_rows(engine, monkeypatch), note_offers(engine)
    want = load(predictable, "off", weights).generate([[5, 6, 7, 8]] * 4, FREE)
    got = engine.generate([[5, 6, 7, 8]] * 4, FREE)
    assert [a.token_ids for a in got] == [a.token_ids for a in want]
    assert sum(head_rows) == len(offers) == engine.stats().drafts_total == 0
    assert len(head_rows) >= 23  # the layer's cache is filled all the same
    got = engine.generate([[5, 6, 7, 8]], FREE)  # a room of three
    assert got[0].token_ids == want[0].token_ids
    assert engine.stats().accepted_draft_tokens_total > 8
    assert max(len(drafts) for _, _, drafts in offers) == 3


def test_guesses_of_several_sequences_share_the_room_as_the_scheduler_does(
    predictable, monkeypatch
):
    engine = load(predictable, max_draft_rows=8, page_tokens=16)
    head_rows, offers = note_head_rows(engine, monkeypatch), note_offers(engine)
    engine.generate(PROMPTS, FREE)
    stats = engine.stats()
    assert {len(drafts) for _, _, drafts in offers} >= {1, 2}
    # The last step of each answer leaves its guesses unused, and so does a step beside a prompt.
    assert stats.draft_tokens_total >= 0.75 * sum(head_rows) > 0


@pytest.mark.parametrize("which", ["directory", "predictable"])
@pytest.mark.parametrize(
    "rules",
    [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.5}, {"logprobs": 2}],
    ids=str,
)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_answers_are_those_without_guesses(which, rules, weights, request):
    directory = request.getfixturevalue(which)
    sampling = msgspec.structs.replace(FREE, **rules)
    want = load(directory, "off", weights).generate(PROMPTS, sampling)
    engine = load(directory, weights=weights)
    got = engine.generate(PROMPTS, sampling)
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in want]
    stats = engine.stats()
    assert stats.draft_tokens_total > 0
    assert stats.kv_pages_used == 0
    engine.core.validate()
    assert len(engine.core._scheduler._drafter) == 0


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_layer_that_knows_the_answer_is_always_right_several_tokens_ahead(predictable, weights):
    engine = load(predictable, weights=weights, max_draft_rows=32, page_tokens=16)
    engine.generate(PROMPTS, FREE)
    stats = engine.stats()
    assert stats.draft_tokens_total > 30
    # Where the layer's input is rounded once more, a near tie may fall the other way.
    share = 1 if weights in ("plain", "f32", "bf16") else 0.85
    assert stats.accepted_draft_tokens_total >= share * stats.draft_tokens_total
    assert stats.draft_tokens_total > 2.5 * stats.drafts_total  # by guesses made from guesses


@pytest.mark.parametrize(("weights", "num_pages"), [("plain", 20), ("int8", 8)])
def test_preemption_and_the_prefix_cache_keep_the_answers(directory, weights, num_pages):
    prompts = [[*range(40, 56), i] for i in range(6)]
    want = load(directory, "off", weights).generate(prompts, FREE)
    engine = load(directory, weights=weights, max_context=64, max_batch_tokens=32)
    kv_bytes = num_pages * engine_page_bytes(engine)
    tight = load(directory, weights=weights, max_context=64, kv_bytes=kv_bytes)
    for one in (engine, tight):
        for _ in range(2):
            got = one.generate(prompts, FREE)
            assert [a.token_ids for a in got] == [a.token_ids for a in want]
        assert any(answer.cached_tokens for answer in got)
    assert tight.stats().preemptions_total > 0


def engine_page_bytes(engine: LocalEngine) -> int:
    from mxn.engine.kvstore import page_bytes

    return page_bytes(engine.core._runner._model, engine.core._runner._page_tokens)


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


@pytest.mark.parametrize("weights", ["bf16", "int4-g32"])
def test_an_artifact_keeps_the_prediction_layer(predictable, weights, tmp_path):
    pack_model(predictable, formats.parse(weights), tmp_path / "packed")
    direct, stored = load(predictable, weights=weights), load(tmp_path / "packed")
    want, got = direct.generate(PROMPTS, FREE), stored.generate(PROMPTS, FREE)
    assert [a.token_ids for a in got] == [a.token_ids for a in want]
    assert stored.stats().accepted_draft_tokens_total > 30


def test_an_artifact_without_a_prediction_layer_says_so(tmp_path):
    tiny.write("deepseek_v3", tmp_path / "source")
    pack_model(tmp_path / "source", formats.parse("int8"), tmp_path / "packed")
    with pytest.raises(UnsupportedError, match="artifact packed has no prediction layer") as caught:
        load(tmp_path / "packed")
    assert "mxn pack" in str(caught.value.hint)


def test_a_head_of_its_own_is_used_and_a_copy_is_not_kept_twice(directory, tmp_path):
    assert native_prediction(directory).parts.mtp[0].head is None
    shutil.copytree(directory, tmp_path / "own")
    stored = load_file(directory / "model.safetensors")
    name = "model.layers.3.shared_head.head.weight"
    stored[name] = -stored[name]
    save_file(stored, tmp_path / "own" / "model.safetensors", metadata={"format": "pt"})
    same, own = native_prediction(directory), native_prediction(tmp_path / "own")
    assert own.parts.mtp[0].head is not None
    assert torch.equal(first_prediction(own), -first_prediction(same))


@pytest.mark.parametrize("has_own_head", [False, True])
def test_a_tied_table_is_the_embedding_of_the_layer_whatever_its_head_is(
    directory, tmp_path, has_own_head
):
    shutil.copytree(directory, tmp_path / "tied")
    path = tmp_path / "tied" / "model.safetensors"
    stored = load_file(path)
    del stored["lm_head.weight"]
    head = "model.layers.3.shared_head.head.weight"
    stored[head] = 0.2 * torch.randn(stored[head].shape, generator=torch.Generator().manual_seed(1))
    if not has_own_head:
        del stored[head]
    save_file(stored, path, metadata={"format": "pt"})
    edit_config(tmp_path / "tied", tie_word_embeddings=True)
    plain, packed = load(tmp_path / "tied"), load(tmp_path / "tied", weights="int8")
    assert packed.core._runner._model.decoder.parts.table_VD is None
    got, want = whole_logits(packed), whole_logits(plain)
    # The table is int8 here and float32 there; rows of another matrix would be all wrong.
    assert (got - want).norm() < 0.15 * want.norm()


def native_prediction(directory):
    return load(directory, weights="f32").core._runner._model.decoder


@torch.inference_mode()
def first_prediction(model) -> torch.Tensor:
    session = Session(model.prediction)
    hidden = torch.linspace(-1, 1, 3 * model.spec.hidden).view(3, -1)
    logits, out = model.predict_after_next(hidden, session.batch({0: [7, 8, 9]}), session.cache[0])
    assert out.isfinite().all()
    return logits.clone()


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4-g32"])
def test_native_logits_of_the_layer_are_those_of_plain_weights(directory, weights):
    # A model of random numbers hangs on every digit: what formats cost real ones is another test.
    plain, packed = load(directory), load(directory, weights=weights)
    got, want = whole_logits(packed), whole_logits(plain)
    error = ((got - want).norm() / want.norm()).item()
    assert error < {"f32": 1e-5, "bf16": 0.02, "int8": 0.1, "int4-g32": 0.45}[weights]


@torch.inference_mode()
def whole_logits(engine: LocalEngine) -> torch.Tensor:
    model = engine.core._runner._model.decoder
    session, tokens = Session(model), list(range(20, 60))
    _, normed = model.forward_hidden(session.batch({0: tokens[:-1]}), session.cache)
    batch = Session(model).batch({0: tokens[1:]})
    cache = Session(getattr(model, "prediction", model)).cache[-1]
    return model.predict_after_next(normed, batch, cache)[0].clone()


@pytest.mark.parametrize(
    ("model", "weights", "reason"),
    [
        ("mxn-shakespeare-dsv3", "plain", "this deepseek_v3 checkpoint has no prediction layer"),
        ("mxn-shakespeare-dsv3", "int8", "this deepseek_v3 checkpoint has no prediction layer"),
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
