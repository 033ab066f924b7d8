"""The loop over the models that ship with the project: batches, pages and text, in both shapes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mxn.engine.config import EngineConfig
from mxn.engine.kvstore import page_bytes
from mxn.engine.local import LocalEngine
from mxn.engine.protocol import SamplingParams
from mxn.models.catalogue import shipped_dir
from mxn.models.tokenizer import Tokenizer

MODELS = shipped_dir()
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
LINES = (
    "ROMEO:\nWhat light",
    "To be",
    "KING HENRY:\nNow is the winter of our discontent made glorious summer by this sun of York;\n",
    "MENENIUS:\nGood friends",
)


@pytest.fixture(scope="module", params=["mxn-shakespeare-llama", "mxn-shakespeare-dsv3"])
def directory(request) -> Path:
    return MODELS / request.param


def load(directory: Path, **settings) -> LocalEngine:
    device = os.environ.get("MXN_TEST_DEVICE", "cpu")
    defaults = {"dtype": "float32", "threads": 1, "max_sequences": 8, "max_batch_tokens": 64}
    return LocalEngine.load(
        EngineConfig(model=str(directory), device=device, **(defaults | settings))
    )


@pytest.fixture(scope="module")
def prompts(directory) -> list[list[int]]:
    tokenizer = Tokenizer.load(directory)
    return [tokenizer.encode(line) for line in LINES]


@pytest.fixture(scope="module")
def alone(directory, prompts) -> list[list[int]]:
    engine = load(directory, prefix_caching=False)
    return [engine.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]


def test_batches_chunks_and_the_prefix_cache_keep_the_tokens(directory, prompts, alone):
    engine = load(directory, max_batch_tokens=16, page_tokens=4)
    for _ in range(2):
        answers = engine.generate(prompts, GREEDY)
        assert [answer.token_ids for answer in answers] == alone
    assert all(a.cached_tokens for a, p in zip(answers, prompts, strict=True) if len(p) > 4)
    assert engine.stats().kv_pages_used == 0


def test_preemption_keeps_the_tokens(directory, prompts, alone):

    model = load(directory).core._runner._model
    size = page_bytes(model, 4)
    engine = load(directory, page_tokens=4, kv_bytes=24 * size, max_context=80)
    answers = engine.generate(prompts, GREEDY)
    assert engine.stats().preemptions_total > 0
    assert [answer.token_ids for answer in answers] == alone


def test_the_text_is_that_of_the_tokens(directory, prompts):
    engine, tokenizer = load(directory), Tokenizer.load(directory)
    drawn = SamplingParams(max_tokens=60, temperature=1.0, seed=3)
    for prompt, answer in zip(prompts, engine.generate(prompts, drawn), strict=True):
        whole = tokenizer.decode(prompt + answer.token_ids)
        assert whole == tokenizer.decode(prompt) + answer.text
