"""The transformers fallback: right logits for what it runs, a reason for what it refuses.

`tools/fallback_report.py` tries every architecture; here is one of each kind.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from mxn.errors import ConfigError, NotFoundError, UnsupportedError
from mxn.models.fallback import probe
from mxn.models.fallback.linear import KernelLinear, swap_linears
from mxn.models.fallback.reasons import exact_context
from mxn.models.load import load_model
from support import any_decoder
from support.fallback_parity import measure
from support.paged import Session

RUNS = (
    "gpt_neox",  # partial rotary, parallel residual, fused qkv
    "gpt2",  # learned positions, Conv1D instead of linear layers
    "opt",  # learned positions with an offset
    "gpt_bigcode",  # one key/value head
    "cohere2",  # sliding and full layers, no rope on full ones, logit scale
    "gpt_oss",  # attention sinks, sliding window, experts
    "deepseek_v3",  # keys and values of different sizes
    "smollm3",  # layers without rope
    "ernie4_5_moe",
    "exaone4",
    "seed_oss",
    "roberta",  # positions that begin behind the padding index
)


@pytest.fixture(autouse=True)
def _no_tuning(monkeypatch):
    monkeypatch.setenv("MXN_KERNEL_TUNING", "off")


@pytest.mark.parametrize("model_type", RUNS)
def test_the_fallback_gives_the_logits_and_tokens_of_transformers(model_type, tmp_path, device):
    outcome = measure(model_type, tmp_path, device)
    assert (outcome.status, outcome.reason) == ("runs", "")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", "state-space layers, whose state is not in pages"),
        ("rwkv", "keeps a recurrent state beside the attention cache"),
        ("xlnet", "does not call attention through transformers' attention interface"),
        ("deepseek_v32", "attention over positions chosen by an indexer"),
        ("bloom", "does not call attention through transformers' attention interface"),
    ],
)
def test_what_cannot_run_over_pages_is_refused_with_its_reason(
    model_type, reason, tmp_path, device
):
    any_decoder.build(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=reason) as refusal:
        load_model(tmp_path, device, "float32")
    assert any_decoder.model_class(model_type).__name__ in str(refusal.value)


def test_an_encoder_decoder_is_refused(tmp_path, device):
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="it is an encoder-decoder"):
        load_model(tmp_path, device, "float32")


def test_the_check_catches_a_model_that_mixes_neighbours(tmp_path, device, monkeypatch):
    """In a flattened batch the token before the first one belongs to another sequence."""
    save("llama", tmp_path)
    original = transformers.models.llama.modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaMLP,
        "forward",
        lambda self, x: original(self, x + 0.3 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]),
    )
    with pytest.raises(UnsupportedError, match=r"differ from transformers' own by 0\.\d+"):
        load_model(tmp_path, device, "float32", prefer_fallback=True)


def test_a_model_that_ignores_positions_it_is_given_is_caught(tmp_path, device, monkeypatch):
    save("gpt2", tmp_path)
    original = transformers.GPT2Model.forward

    def forward(self, *args, position_ids=None, **options):
        return original(self, *args, **options)

    monkeypatch.setattr(transformers.GPT2Model, "forward", forward)
    with pytest.raises(UnsupportedError, match=r"instead of using their positions \(modeling_gpt2"):
        load_model(tmp_path, device, "float32", prefer_fallback=True)


def test_the_window_is_that_of_the_mask_whatever_the_layer_says(tmp_path, device, monkeypatch):
    """The probe asks the mask about far positions, so a short check still learns a long window."""
    reference = save("starcoder2", tmp_path, sliding_window=1000)
    assert reference.config.sliding_window == 1000
    model = load_model(tmp_path, device, "float32", prefer_fallback=True).model
    assert {call.window for call in model.calls} == {1000}


def test_the_check_can_be_switched_off(tmp_path, device, monkeypatch):
    save("gpt_neox", tmp_path)
    monkeypatch.setenv("MXN_FALLBACK_CHECK", "off")
    monkeypatch.setattr("mxn.models.fallback.check.check", lambda *_: pytest.fail("was checked"))
    loaded = load_model(tmp_path, device, "float32")
    assert (loaded.is_native, loaded.family) == (False, "transformers:gpt_neox")
    monkeypatch.setenv("MXN_FALLBACK_CHECK", "maybe")
    with pytest.raises(ConfigError, match="must be on or off, got 'maybe'"):
        load_model(tmp_path, device, "float32")


def test_bfloat16_passes_its_own_tolerance(tmp_path, device):
    save("gpt_neox", tmp_path)
    loaded = load_model(tmp_path, device, "bfloat16")
    assert (loaded.dtype, loaded.model.dtype) == ("bfloat16", torch.bfloat16)


def test_a_missing_tensor_is_named(tmp_path, device):
    save("gpt_neox", tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["gpt_neox.final_layer_norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(NotFoundError, match="final_layer_norm"):
        load_model(tmp_path, device, "float32")


def test_quantized_weights_are_refused_by_method(tmp_path, device):
    reference = save("gpt_neox", tmp_path)
    reference.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    reference.config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"quantized weights \(gptq\)"):
        load_model(tmp_path, device, "float32")


def test_context_ends_where_rope_frequencies_would_switch_for_the_whole_step():
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4, "original_max_position_embeddings": 128, "factor": 2.0,
    }  # fmt: skip
    config = transformers.Phi3Config(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=256, rope_parameters=rope,
        original_max_position_embeddings=128,
    )  # fmt: skip
    assert exact_context(config) == 128
    assert exact_context(transformers.LlamaConfig(hidden_size=32, num_attention_heads=4)) is None


def test_llama4_ends_before_its_scaling_by_a_count_of_tokens_begins(tmp_path, device):
    save("llama4_text", tmp_path, floor_scale=40, attention_chunk_size=64)
    loaded = load_model(tmp_path, device, "float32")
    assert loaded.max_context == 39
    tokens = list(range(5, 30))
    first, second = Session(loaded.model), Session(loaded.model)
    # 50 tokens in one step: counted along the step, the second half would be scaled.
    alone = first.step({0: tokens})[0]
    beside = second.step({0: tokens, 1: tokens})[1]
    assert (alone - beside).abs().max().item() < 1e-4


def test_code_that_counts_tokens_instead_of_using_positions_is_refused(
    tmp_path, device, monkeypatch
):
    """The check cannot see it: with nine tokens the scale is one whatever they are numbered."""
    save("llama4_text", tmp_path)
    monkeypatch.setattr("mxn.models.fallback.reasons.forgo_token_count", lambda config: None)
    with pytest.raises(UnsupportedError, match=r"counts the tokens .* \(modeling_llama4\.py:\d+"):
        load_model(tmp_path, device, "float32")


class Router(torch.nn.Module):
    """Like some routers, reads the weight of one layer and the dtype of another."""

    def __init__(self) -> None:
        super().__init__()
        self.used = torch.nn.Linear(8, 4)
        self.read = torch.nn.Linear(8, 4)
        self.kept = torch.nn.Linear(8, 4, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.used.weight.dtype)
        return self.used(x) + torch.nn.functional.linear(x, self.read.weight)


def test_layers_whose_weight_is_read_or_kept_in_another_dtype_are_not_swapped(device):
    from mxn.kernels.registry import Ops

    router, x = Router(), torch.randn(2, 3, 8)
    want = router(x)
    router = router.to(device.torch_device)
    ops = Ops.bind(device.torch_device, device.chip, torch.float32)
    assert swap_linears(router, ops) == 1
    assert isinstance(router.used, KernelLinear)
    assert type(router.read) is type(router.kept) is torch.nn.Linear
    got = router(x.to(device.torch_device)).cpu()
    assert (got - want).abs().max().item() < 1e-6


def chunks_of(size: int):
    return lambda b, h, q, k: (k <= q) & (q // size == k // size)


@pytest.mark.parametrize(
    ("function", "mask"),
    [
        (causal_mask_function, probe.Mask()),
        (sliding_window_causal_mask_function(3), probe.Mask(window=3)),
        (sliding_window_causal_mask_function(4096), probe.Mask(window=4096)),
        (chunks_of(8), probe.Mask(chunk=8)),
        (chunks_of(8192), probe.Mask(chunk=8192)),
        (chunks_of(1000), probe.Mask(chunk=1000)),
    ],
)
def test_masks_are_told_apart_by_asking_them(function, mask):
    assert probe.classify(function) == mask


@pytest.mark.parametrize(
    "function",
    [
        bidirectional_mask_function,
        lambda b, h, q, k: (k <= q) & (k % 2 == 0),  # strided
        lambda b, h, q, k: (k <= q) & ((k > q - 5) | (k < 2)),  # window and first tokens
        lambda b, h, q, k: torch.ones(4, 4, dtype=torch.bool)[q, k],  # of some tokens only
    ],
)
def test_other_masks_are_refused(function):
    with pytest.raises(UnsupportedError, match="its mask"):
        probe.classify(function)


def save(model_type: str, directory: Path, **changes) -> torch.nn.Module:
    """Save a tiny checkpoint whose config has `changes`, and return the model."""
    model = any_decoder.build(model_type)
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.save_pretrained(directory)
    return model
