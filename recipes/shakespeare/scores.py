"""Held-out scores of the baselines and of an exported checkpoint, as `transformers` runs it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

import baselines
from shakespeare.batches import encode
from shakespeare.corpus import TextSplit, load_split
from shakespeare.evaluate import Score, total_nats
from shakespeare.shapes import CONTEXT_TOKENS


def _score(tokenizer: Tokenizer, text: str, ids: list[int], nats: float) -> Score:
    unscored = len(tokenizer.decode(ids[:1]).encode())
    return Score(nats=nats, num_tokens=len(ids) - 1, num_bytes=len(text.encode()) - unscored)


def score_baselines(tokenizer: Tokenizer, split: TextSplit | None = None) -> dict[str, Score]:
    """Return the scores of the unigram and the 5-gram on the held-out text."""
    split = split or load_split()
    train = encode(tokenizer, split.train).tolist()
    heldout = encode(tokenizer, split.heldout).tolist()
    size = tokenizer.get_vocab_size()
    models = {
        "unigram": baselines.Unigram(train, size),
        "5-gram Kneser-Ney": baselines.KneserNey(train, size, order=5),
    }
    return {
        name: _score(tokenizer, split.heldout, heldout, baselines.total_nats(model, heldout))
        for name, model in models.items()
    }


def score_checkpoint(folder: Path, text: str) -> Score:
    """Return the score of an exported folder: its bfloat16 weights, computed in float32."""
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = encode(tokenizer, text)
    nats = total_nats(lambda x: model(x).logits, torch.from_numpy(ids), CONTEXT_TOKENS)
    return _score(tokenizer, text, ids.tolist(), nats)
