"""Checkpoints whose config.json leaves a choice: LongRoPE contexts, heads that are tied or not."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mxn.models.load import load_model
from support import tiny
from support.paged import Session

ORIGINAL = 16
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
}  # fmt: skip


@pytest.fixture
def long_rope(tmp_path):
    """A Phi-3 with 512 positions, of which the first 16 have their own frequencies."""
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        **tiny._BASE, rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL,
        sliding_window=None,
    )  # fmt: skip
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    reference.save_pretrained(tmp_path)
    return tmp_path, reference


def test_the_reference_changes_its_frequencies_at_the_original_length(long_rope):
    rotary = long_rope[1].model.rotary_emb
    before = rotary.inv_freq.clone()
    rotary(torch.zeros(1, 1, 12), torch.arange(ORIGINAL + 1)[None])
    assert (before - rotary.inv_freq).abs().max() > 1e-3


def error_over(reference, model, tokens: list[int]) -> float:
    want = reference(torch.tensor([tokens]), use_cache=False).logits[0]
    got = Session(model).step({0: tokens})[0]
    return ((got - want).abs().max() / want.abs().max()).item()


@torch.inference_mode()
def test_longrope_ends_at_the_original_length_and_is_exact_up_to_it(long_rope, device):
    directory, reference = long_rope
    loaded = load_model(directory, device, "float32")
    assert loaded.max_context == ORIGINAL
    assert error_over(reference, loaded.model, list(range(3, 3 + ORIGINAL))) < 1e-4


@torch.inference_mode()
def test_longrope_with_a_longer_context_is_exact_beyond_the_original_length(long_rope, device):
    directory, reference = long_rope
    loaded = load_model(directory, device, "float32", max_context=64)
    assert loaded.max_context == 512
    assert error_over(reference, loaded.model, list(range(3, 60))) < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("is_equal", [True, False])
def test_a_head_in_a_tied_checkpoint_counts_if_it_differs(tmp_path, device, is_equal):
    tiny.write("llama3", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(4))
    tensors["lm_head.weight"] = embedding.clone() if is_equal else noise
    save_file(tensors, path, metadata={"format": "pt"})
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    loaded = load_model(tmp_path, device, "float32")
    assert error_over(reference, loaded.model, list(range(3, 30))) < 1e-4
    assert loaded.num_parameters == sum(p.numel() for p in reference.parameters())


@torch.inference_mode()
@pytest.mark.parametrize(
    "case", ["llama3", "qwen3", "gemma2", "gemma3", "deepseek_v2-lite", "phi3"]
)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path, device, case):
    exact_model = tiny.write(case, tmp_path)
    rounded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens = list(range(3, 60))
    exact = exact_model(torch.tensor([tokens])).logits[0]
    theirs = rounded.eval()(torch.tensor([tokens])).logits[0].float()
    loaded = load_model(tmp_path, device, "bfloat16")
    ours = Session(loaded.model).step({0: tokens})[0]

    def error(got: torch.Tensor) -> float:  # median over tokens: one may choose another expert
        return (got - exact).abs().amax(1).median().item() / exact.abs().max().item()

    assert loaded.dtype == "bfloat16"
    assert error(ours) < 1.5 * error(theirs)
    assert error(theirs) < 0.05
