"""GGUF models as a whole: logits and token ids against transformers and sentencepiece.

The golden files come from tools/make_gguf_golden.py, written by PyPI's `gguf`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mxn.models.hub import resolve
from mxn.models.load import load_model
from mxn.models.tokenizer import Tokenizer
from support.paged import Session

GOLDEN = Path(__file__).parent / "golden" / "gguf"
LOGITS = load_file(GOLDEN / "logits.safetensors")
TOKENS = json.loads((GOLDEN / "tokens.json").read_text(encoding="utf-8"))["ids"]
LOGIT_TOLERANCE = 1e-4  # float32 sums in another order


@torch.inference_mode()
@pytest.mark.parametrize("name", sorted(LOGITS))
def test_logits_are_those_of_transformers_on_the_same_file(name, device):
    loaded = load_model(resolve(str(GOLDEN / f"{name}.gguf")), device, "float32")
    want = LOGITS[name]
    got = Session(loaded.model).step({0: list(range(3, 3 + len(want)))})[0]
    assert loaded.is_native
    assert loaded.max_context == 256
    assert loaded.unused_tensors == ()
    assert (got - want).abs().max() / want.abs().max() < LOGIT_TOLERANCE


@pytest.mark.parametrize("name", sorted(TOKENS))
def test_token_ids_are_those_of_the_library_that_made_the_vocabulary(name):
    tokenizer = Tokenizer.load(GOLDEN / f"{name}.gguf")
    for text, want in TOKENS[name].items():
        assert tokenizer.encode(text) == want, text
        plain = tokenizer.decode(want)
        assert plain == text.replace("<|im_start|>", "").replace("<|im_end|>", "")


def test_special_tokens_and_the_chat_template_come_from_the_file():
    tokenizer = Tokenizer.load(GOLDEN / "qwen2.gguf")
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.added_id("<|im_start|>") is not None
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "hi"
