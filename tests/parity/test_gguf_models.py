"""GGUF models as a whole: logits and token ids against transformers and sentencepiece.

The golden files come from tools/make_gguf_golden.py, written by PyPI's `gguf`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mxn.kernels.native import formats, missing_reason
from mxn.models.checkpoint import Checkpoint
from mxn.models.hub import resolve
from mxn.models.load import load_model, pack_model
from mxn.models.quantized.gguf_storage import GgufStorage
from mxn.models.quantized.matrix import QuantizedMatrix
from mxn.models.tokenizer import Tokenizer
from support import gguf_writer
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


def reference(path: Path, rope: dict) -> transformers.LlamaForCausalLM:
    """Return transformers' llama with the weights of a file of `gguf_writer.llama_tensors`."""
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=256, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        rms_norm_eps=1e-5, rope_parameters=rope, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    storage = GgufStorage(path)
    for name, parameter in model.named_parameters():
        if storage.is_quantized(name):
            parameter.data = storage.matrix(name).dequantize()
        else:
            parameter.data = storage.read(name)
    return model


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


@torch.inference_mode()
@pytest.mark.parametrize("has_factors", [False, True], ids=["plain", "llama3"])
def test_a_llama_of_mixed_k_types_has_the_logits_of_the_dequantized_one(
    tmp_path, device, has_factors
):
    """As Q4_K_M files are: v and down in Q6_K, Llama 3's frequencies as a tensor of divisors."""
    tensors = gguf_writer.llama_tensors()
    path = tmp_path / "m.gguf"
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    gguf_writer.write(path, gguf_writer.llama(), tensors)
    model = reference(path, LLAMA3 if has_factors else rope)
    if has_factors:
        divisors = 10000.0 ** (-torch.arange(0, 64, 2) / 64) / model.model.rotary_emb.inv_freq
        assert divisors.max() > 4
        tensors["rope_freqs.weight"] = gguf_writer.Stored.plain(divisors)
        gguf_writer.write(path, gguf_writer.llama(), tensors)
    tokens = list(range(3, 35)) * 3
    want = model(torch.tensor([tokens])).logits[0]
    loaded = load_model(path, device, "float32")
    got = Session(loaded.model).step({0: tokens})[0]
    assert (got - want).abs().max() / want.abs().max() < LOGIT_TOLERANCE
    assert loaded.num_parameters == sum(p.numel() for p in model.parameters())
    assert loaded.unused_tensors == ()


@pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))
@pytest.mark.parametrize("weights", ["plain", "f32", "int8", "int6", "int4"])
@pytest.mark.parametrize("embedding", [None, gguf_writer.Q4_K, gguf_writer.Q6_K])
def test_a_tied_embedding_counts_once_however_it_is_kept(tmp_path, device, weights, embedding):
    tensors = gguf_writer.llama_tensors()
    if embedding is not None:
        generator = torch.Generator().manual_seed(1)
        stored = gguf_writer.Stored.random(40, 256, embedding, generator)
        tensors["token_embd.weight"] = stored
    gguf_writer.write(tmp_path / "m.gguf", gguf_writer.llama(), tensors)
    format = None if weights == "plain" else formats.parse(weights)
    loaded = load_model(tmp_path / "m.gguf", device, "float32", format=format, num_threads=1)
    assert loaded.num_parameters == sum(math.prod(stored.shape) for stored in tensors.values())
    assert loaded.unused_tensors == ()


def test_parts_of_mixed_k_types_join_exactly(tmp_path):
    path = tmp_path / "m.gguf"
    gguf_writer.write(path, gguf_writer.llama(), gguf_writer.llama_tensors())
    checkpoint = Checkpoint(path)
    found = [checkpoint.quantized(f"model.layers.0.self_attn.{p}_proj") for p in ("q", "k", "v")]
    parts = [part for part in found if part is not None]
    assert [(part.bits, part.group) for part in parts] == [(4, 32), (4, 32), (6, 16)]
    joined = QuantizedMatrix.cat(parts)
    assert (joined.shape, joined.bits, joined.group) == ((512, 256), 6, 16)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))


@torch.inference_mode()
@pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))
@pytest.mark.parametrize("weights", ["int4", "int4-g128-sym", "int6", "int8"])
def test_q_and_k_of_a_q4_k_m_file_are_never_rounded_again(tmp_path, device, weights):
    """v has 6 bits there: it is rounded where 4 are wanted, and it alone."""
    path = tmp_path / "m.gguf"
    gguf_writer.write(path, gguf_writer.llama(), gguf_writer.llama_tensors())
    loaded = load_model(path, device, "float32", format=formats.parse(weights), num_threads=1)
    layer = loaded.model.parts.layers[0]
    checkpoint = Checkpoint(path)
    found = [checkpoint.quantized(f"model.layers.0.self_attn.{p}_proj") for p in ("q", "k", "v")]
    q, k, v = (part.dequantize() for part in found if part is not None)
    got = layer.attention.qkv.dequantize().split([256, 128, 128])
    assert layer.attention.qkv.format.bits == (4 if weights.startswith("int4") else 6)
    # Scales and minima are kept as float16: half a unit of 11 bits, of the largest product.
    for want, kept in ((q, got[0]), (k, got[1])):
        assert (kept - want).abs().max() < 2**-10 * want.abs().max()
    error = float((got[2] - v).norm() / v.norm())
    assert (0.02 < error < 0.12) if weights.startswith("int4") else error < 2**-10
    assert loaded.unused_tensors == ()


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


@torch.inference_mode()
@pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))
@pytest.mark.parametrize("name", sorted(LOGITS))
def test_an_artifact_of_a_gguf_file_needs_the_file_no_more(name, tmp_path):
    from mxn.chips import find_device

    out, want = tmp_path / "packed", LOGITS[name]
    pack_model(GOLDEN / f"{name}.gguf", formats.parse("f32"), out)
    loaded = load_model(out, find_device("cpu"), "float32")
    got = Session(loaded.model).step({0: list(range(3, 3 + len(want)))})[0]
    assert (got - want).abs().max() / want.abs().max() < LOGIT_TOLERANCE
    text = "the model takes"
    assert Tokenizer.load(out).encode(text) == Tokenizer.load(GOLDEN / f"{name}.gguf").encode(text)
