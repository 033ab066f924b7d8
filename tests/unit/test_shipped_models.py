"""The checkpoints that ship with mxn: complete, small, better than the baselines, good to chat."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
LLAMA, DSV3 = (ROOT / "src/mxn/shipped" / f"mxn-shakespeare-{shape}" for shape in ("llama", "dsv3"))
FOLDERS = (LLAMA, DSV3)
LIMIT_BYTES = {LLAMA: 16_000_000, DSV3: 8_000_000}
FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
)
SLICE_TOKENS = 4096
CHAT = [
    {"role": "system", "content": "Two households, both alike in dignity."},
    {"role": "user", "content": " What's in a name? "},
    {"role": "assistant", "content": "Call me but love."},
    {"role": "user", "content": [{"type": "text", "text": "Art thou not Romeo?"}]},
]
CHAT_TEXT = (
    "<|bos|>Chorus:\nTwo households, both alike in dignity.<|eos|>"
    "JULIET:\nWhat's in a name?<|eos|>"
    "ROMEO:\nCall me but love.<|eos|>"
    "JULIET:\nArt thou not Romeo?<|eos|>"
    "ROMEO:\n"
)

each_model = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@pytest.fixture(scope="module")
def recipes() -> Any:
    """The import path of the recipes, for their split and their rule of scoring."""
    sys.path.insert(0, str(ROOT / "recipes"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "recipes"))


@pytest.fixture(scope="module")
def loaded() -> dict[Path, Any]:
    """Both models in float32, with what loading reported."""
    import torch
    from transformers import AutoModelForCausalLM

    return {
        folder: AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        for folder in FOLDERS
    }


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def tokenizer_of(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@each_model
def test_all_files_are_there_and_within_the_limit(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(FILES) <= set(sizes), "files missing"
    assert all(sizes.values()), sizes
    assert sum(sizes.values()) <= LIMIT_BYTES[folder], sizes


@each_model
def test_transformers_loads_it_without_missing_or_unexpected_weights(
    folder: Path, loaded: dict[Path, Any]
) -> None:
    model, report = loaded[folder]
    assert type(model).__name__ == read(folder, "config.json")["architectures"][0]
    problems = {name: keys for name, keys in report.items() if keys}
    assert not problems
    assert model.generation_config.eos_token_id == 1


def test_the_deepseek_model_has_every_part_of_the_shape(loaded: dict[Path, Any]) -> None:
    config = loaded[DSV3][0].config
    assert min(config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim) > 0
    assert 1 < config.topk_group < config.n_group < config.n_routed_experts
    assert (config.first_k_dense_replace, config.n_shared_experts) == (1, 1)
    biases = [
        tensor
        for name, tensor in loaded[DSV3][0].state_dict().items()
        if name.endswith("e_score_correction_bias")
    ]
    assert len(biases) == config.num_hidden_layers - 1
    assert all(float(bias.abs().max()) > 0.01 for bias in biases), "the balance bias is untrained"


@each_model
def test_heldout_perplexity_is_below_both_baselines(
    folder: Path, loaded: dict[Path, Any], recipes: Any
) -> None:
    import math

    import torch

    text = recipes("shakespeare.corpus").load_split().heldout
    ids = torch.tensor(tokenizer_of(folder).encode(text).ids[:SLICE_TOKENS])
    model = loaded[folder][0]
    nats = recipes("shakespeare.evaluate").total_nats(lambda x: model(x).logits, ids, 1024)
    perplexity = math.exp(nats / (len(ids) - 1))
    recorded = {
        name: score["perplexity_per_token"]
        for name, score in read(folder, "training.json")["heldout"].items()
    }
    assert perplexity < recorded["5-gram Kneser-Ney"] < recorded["unigram"]
    assert perplexity == pytest.approx(recorded[folder.name], rel=0.2), "not the model of the card"


@each_model
def test_mxn_gives_the_logits_of_transformers_on_heldout_text(
    folder: Path, loaded: dict[Path, Any], recipes: Any, device: Any
) -> None:
    import torch

    from mxn.models.load import load_model
    from support.paged import Session

    text = recipes("shakespeare.corpus").load_split().heldout
    ids = tokenizer_of(folder).encode(text).ids[:200]
    native = load_model(folder, device, "float32", allow_fallback=False)
    with torch.inference_mode():
        got = Session(native.model).step({0: ids})[0]
        want = loaded[folder][0](torch.tensor([ids])).logits[0]
    assert native.unused_tensors == ()
    assert float((got - want).abs().max() / want.abs().max()) < 1e-4


@each_model
def test_the_card_quotes_the_measured_figures(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    facts = read(folder, "training.json")
    for name, score in facts["heldout"].items():
        assert f"| {name} | {score['perplexity_per_token']} | {score['bits_per_byte']} |" in card
    assert facts["command"] in card
    assert facts["weight_bytes"] == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_tokenizer_keeps_any_text(folder: Path, text: str) -> None:
    tokenizer = tokenizer_of(folder)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(token < 1024 for token in ids)


@each_model
def test_transformers_uses_the_tokenizer_as_it_is_stored(folder: Path) -> None:
    from transformers import AutoTokenizer

    fast, text = (
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        "Ay, é 🎭\n\nROMEO:\n",
    )
    assert fast.encode(text) == tokenizer_of(folder).encode(text).ids
    assert (fast.bos_token_id, fast.eos_token_id) == (0, 1)


@each_model
def test_the_chat_template_turns_messages_into_speeches(folder: Path) -> None:
    from transformers import AutoTokenizer

    from mxn.models.chat_template import ChatTemplates

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    theirs = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ours = ChatTemplates.load(folder, read(folder, "tokenizer_config.json")).render(
        CHAT, add_generation_prompt=True, bos_token="<|bos|>", eos_token="<|eos|>"
    )
    assert theirs == ours == CHAT_TEXT


def test_the_chat_template_takes_other_speakers_and_refuses_unknown_roles() -> None:
    from mxn.errors import UserError
    from mxn.models.chat_template import ChatTemplates

    templates = ChatTemplates.load(LLAMA, read(LLAMA, "tokenizer_config.json"))
    tokens = {"bos_token": "", "eos_token": "#"}
    messages = [{"role": "user", "name": "KATHARINA", "content": "Well?"}]
    text = templates.render(messages, add_generation_prompt=True, speaker="PETRUCHIO", **tokens)
    assert text == "KATHARINA:\nWell?#PETRUCHIO:\n"
    with pytest.raises(UserError, match="not tool"):
        templates.render([{"role": "tool", "content": "4"}], **tokens)


@each_model
def test_speeches_end_in_a_chat_and_plain_text_goes_on(
    folder: Path, loaded: dict[Path, Any], recipes: Any
) -> None:
    import torch

    corpus = recipes("shakespeare.corpus")
    text = corpus.load_split().heldout[:3000]
    dialogue = "<|bos|>" + "<|eos|>".join(corpus.speeches(text)[:-1]) + "<|eos|>"
    tokenizer, model = tokenizer_of(folder), loaded[folder][0]

    @torch.no_grad()
    def eos_probability(prompt: str) -> tuple[Any, Any]:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        return ids[0, 1:], model(ids).logits[0, :-1].softmax(-1)[:, 1]

    ids, probability = eos_probability(dialogue)
    assert float(probability[ids == 1].mean()) > 0.3, "a speech of a chat does not end"
    _, probability = eos_probability(text)
    assert float(probability.mean()) < 1 / 1000, "plain text would stop within 1000 tokens"


def test_kneser_ney_probabilities_sum_to_one_in_every_kind_of_context(recipes: Any) -> None:
    rng = random.Random(3)
    ids = [min(rng.randrange(9), rng.randrange(9)) for _ in range(600)]
    model = recipes("baselines").KneserNey(ids, vocab_size=12, order=4)
    for context in ((), (1,), tuple(ids[5:8]), (11, 11, 11), (*ids[40:42], 10)):
        total = sum(model.probability(token, context) for token in range(12))
        assert total == pytest.approx(1.0, abs=1e-9), context


def test_training_batches_depend_on_seed_and_step_alone(recipes: Any) -> None:
    text = recipes("shakespeare.corpus").load_split().valid
    make = recipes("shakespeare.batches").Batches
    size = {"batch_tokens": 512, "row_tokens": 64}

    def rows(seed: int, step: int) -> list[Any]:
        batches = make(tokenizer_of(LLAMA), text, seed=seed, dialogue_share=0.5)
        inputs, targets = batches.at(step, **size)
        assert inputs[:, 1:].equal(targets[:, :-1])
        return inputs.tolist()

    assert rows(1, 7) == rows(1, 7)
    assert rows(1, 7) != rows(1, 8)
    assert rows(1, 7) != rows(2, 7)


def test_a_run_is_continued_only_where_its_past_is_the_same(recipes: Any) -> None:
    run = recipes("shakespeare.training").Settings
    older = run(steps=1000, seed=1)
    assert run(steps=2000, seed=1).can_continue(older, step=older.steady_steps)
    assert not run(steps=2000, seed=1).can_continue(older, step=older.steady_steps + 1)
    assert not run(steps=2000, seed=2).can_continue(older, step=1)
    assert run(steps=1000, long_steps=50, seed=1).can_continue(older, step=1000)
    assert older.lr_factor(0) < older.lr_factor(100) == 1.0 > older.lr_factor(999) > 0
