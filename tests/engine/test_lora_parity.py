"""Adapters against PEFT: the projections of families, many adapters in one batch, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch

from mxn.chips import find_device
from mxn.chips.sim.testing import sim
from mxn.errors import MxnError, NotFoundError, UnsupportedError
from mxn.models.load import load_model
from mxn.models.lora import AdaptedModel, Part, segments_of
from mxn.models.lora_files import read_adapter
from support import tiny
from support.paged import Session

__all__ = ["sim"]

RELATIVE_ERROR = 1e-4  # of the largest logit; float32
TOKENS = list(range(5, 34))

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama3": {"target_modules": ["q_proj", "v_proj"]},
    "llama-bias": {"target_modules": "all-linear", "r": 3, "lora_alpha": 7},
    "qwen2": {"target_modules": r".*\.(k_proj|down_proj)", "use_rslora": True},
    "qwen3": {
        "target_modules": [*ATTENTION, *MLP, "lm_head"],
        "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
        "alpha_pattern": {"up_proj": 1},
    },
    "phi3": {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]},
    "glm": {"target_modules": ["gate_up_proj", "k_proj"]},
    "gemma2": {"target_modules": "all-linear"},
    "mixtral": {"target_modules": ATTENTION},
    "qwen2_moe": {"target_modules": ["q_proj", *MLP]},
    "deepseek_v2-lite": {"target_modules": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    "deepseek_v3": {"target_modules": r".*(q_a|q_b|kv_b|kv_a|o)_proj(_with_mqa)?"},
}


def train(reference, folder: Path, *, seed: int = 0, **options) -> torch.nn.Module:
    """Save a LoRA adapter of random numbers and return PEFT's model with it."""
    torch.manual_seed(seed)
    defaults = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(reference, peft.LoraConfig(**(defaults | options))).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.copy_(0.15 * torch.randn(tensor.shape))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def load(directory: Path, **options):
    return load_model(directory, find_device("cpu"), "float32", **options).model


@torch.inference_mode()
def logits_of(reference, tokens: list[int]) -> torch.Tensor:
    return reference(torch.tensor([tokens]), use_cache=False).logits[0].float()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def adapted_step(model, adapted: AdaptedModel, keys, tokens) -> list[torch.Tensor]:
    """Return the logits of sequences in one pass, sequence i through adapter ``keys[i]``."""
    parts = [Part(key, len(ids), len(ids)) for key, ids in zip(keys, tokens, strict=True)]
    with adapted.applied(parts):
        return list(Session(model).step(dict(enumerate(tokens))).values())


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_the_logits_are_those_of_peft(case, tmp_path):
    reference = tiny.write(case, tmp_path / "base")
    model = load(tmp_path / "base", allow_fallback=False)
    plain = logits_of(reference, TOKENS)
    want = logits_of(train(reference, tmp_path / "adapter", **CASES[case]), TOKENS)
    assert relative_error(plain, want) > 0.05, "the adapter must matter"
    adapted = AdaptedModel(model)
    adapted.install(1, read_adapter(tmp_path / "adapter"))
    (got,) = adapted_step(model, adapted, [1], [TOKENS])
    assert relative_error(got, want) < RELATIVE_ERROR
    (base,) = adapted_step(model, adapted, [None], [TOKENS])
    assert relative_error(base, plain) < RELATIVE_ERROR


@torch.inference_mode()
def test_each_row_of_a_batch_goes_through_its_own_adapter(tmp_path):
    for number in (1, 2):
        reference = tiny.write("deepseek_v3", tmp_path / "base")
        options = CASES["deepseek_v3"] | {"r": 2 + number}
        train(reference, tmp_path / str(number), seed=number, **options)
    model = load(tmp_path / "base")
    adapted = AdaptedModel(model)
    texts = [TOKENS[i : i + 3 + i] for i in range(6)]
    keys = [1, None, 2, 1, None, 2]
    before = list(Session(model).step(dict(enumerate(texts))).values())
    for number in (1, 2):
        adapted.install(number, read_adapter(tmp_path / str(number)))
    got = adapted_step(model, adapted, keys, texts)
    for i, key in enumerate(keys):
        (alone,) = adapted_step(model, adapted, [key], [texts[i]])
        assert relative_error(got[i], alone) < 1e-5
        assert (relative_error(got[i], before[i]) > 0.05) == (key is not None)
    idle = list(Session(model).step(dict(enumerate(texts))).values())
    assert all(torch.equal(a, b) for a, b in zip(idle, before, strict=True))
    heads = [weights.attention.key_up for weights in model.layers]
    for number in (1, 2):
        adapted.remove(number)
    assert all(w.attention.key_up is h.base for w, h in zip(model.layers, heads, strict=True))


@torch.inference_mode()
def test_rows_of_the_base_model_keep_their_bits(tmp_path):
    reference = tiny.write("qwen3", tmp_path / "base")
    train(reference, tmp_path / "adapter", **CASES["qwen3"])
    model = load(tmp_path / "base")
    texts = [TOKENS[i : i + 4] for i in range(5)]
    before = list(Session(model).step(dict(enumerate(texts))).values())
    adapted = AdaptedModel(model)
    adapted.install(7, read_adapter(tmp_path / "adapter"))
    got = adapted_step(model, adapted, [7, None, 7, None, None], texts)
    for i in (1, 3, 4):
        assert torch.equal(got[i], before[i])
    for i in (0, 2):
        assert not torch.equal(got[i], before[i])


def test_segments_are_slices_where_rows_stand_together():
    cpu = torch.device("cpu")
    found = segments_of([None, 1, 1, 2, None, 2], [3, 2, 1, 1, 1, 2], cpu)
    assert (found[0].adapter, found[0].rows) == (1, slice(3, 6))
    assert found[1].adapter == 2
    assert found[1].rows.tolist() == [6, 8, 9]
    assert segments_of([1], [0], cpu) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A llama and a good adapter for it."""
    path = tmp_path_factory.mktemp("lora")
    train(tiny.write("llama3", path / "base"), path / "good", target_modules=["q_proj", "v_proj"])
    return path


def changed(folder: Path, target: Path, **config) -> Path:
    """Copy the good adapter, with other values in its configuration."""
    target.mkdir()
    text = json.loads((folder / "good" / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(text))
    weights = (folder / "good" / "adapter_model.safetensors").read_bytes()
    (target / "adapter_model.safetensors").write_bytes(weights)
    return target


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"some_new_option": 3}, "some_new_option is 3"),
        ({"r": 8}, "has rank 8 by adapter_config.json, but lora_A is"),
        ({"r": 0}, "r of .* must be above 0, got 0"),
        ({"target_modules": ["q_proj", "k_proj"]}, "target_modules names 'k_proj'"),
        ({"target_modules": r".*\.q_proj"}, r"does not match 'model.layers.0.self_attn.v_proj'"),
    ],
)
def test_what_is_not_read_is_refused_by_name(folder, tmp_path, config, message):
    with pytest.raises(MxnError, match=message):
        read_adapter(changed(folder, tmp_path / "adapter", **config))


def test_files_that_are_missing_or_broken_are_named(folder, tmp_path):
    with pytest.raises(NotFoundError, match="is not a folder"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)
    path = changed(folder, tmp_path / "cut")
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(NotFoundError, match="cut short"):
        read_adapter(path)
    weights.rename(path / "adapter_model.bin")
    with pytest.raises(NotFoundError, match="a pickle file, is not loaded"):
        read_adapter(path)


def test_an_adapter_of_another_base_is_refused_and_leaves_no_trace(folder, tmp_path):
    tiny.write("llama-bias", tmp_path / "other")
    model = load(tmp_path / "other")
    weights = model.layers[0].attention.qkv
    adapted = AdaptedModel(model)
    with pytest.raises(UnsupportedError, match="maps 48 to 48, the model's maps 48 to 64"):
        adapted.install(1, read_adapter(folder / "good"))
    assert model.layers[0].attention.qkv is weights
    tiny.write("deepseek_v3", tmp_path / "mla")
    with pytest.raises(UnsupportedError, match=r"no layer 'model.layers.0.self_attn.q_proj'"):
        AdaptedModel(load(tmp_path / "mla")).install(1, read_adapter(folder / "good"))


def test_experts_are_refused(tmp_path):
    reference = tiny.write("mixtral", tmp_path / "base")
    train(reference, tmp_path / "adapter", target_modules=["q_proj"])
    model, files = load(tmp_path / "base"), read_adapter(tmp_path / "adapter")
    name = "model.layers.0.block_sparse_moe.experts.0.w1"
    files.pairs[name] = next(iter(files.pairs.values()))
    with pytest.raises(UnsupportedError, match="belongs to an expert"):
        AdaptedModel(model).install(1, files)


@torch.inference_mode()
def test_the_fallback_takes_adapters_too(folder):
    model = load(folder / "base", prefer_fallback=True)
    native = load(folder / "base")
    files = read_adapter(folder / "good")
    got = []
    for each in (model, native):
        adapted = AdaptedModel(each)
        adapted.install(1, files)
        got.append(adapted_step(each, adapted, [None, 1, None, 1], [TOKENS[:9]] * 4))
    for a, b in zip(*got, strict=True):
        assert relative_error(a, b) < RELATIVE_ERROR
    assert relative_error(got[0][1], got[0][0]) > 0.05


@pytest.mark.sim
@torch.inference_mode()
def test_the_simulated_chip_gives_the_same_logits(folder, sim):
    files, logits = read_adapter(folder / "good"), []
    for device in ("cpu", "sim:0"):
        model = load_model(folder / "base", find_device(device), "float32").model
        adapted = AdaptedModel(model)
        adapted.install(1, files)
        logits.append(adapted_step(model, adapted, [None, 1, None, 1, 1], [TOKENS[:7]] * 5))
    for a, b in zip(*logits, strict=True):
        assert relative_error(b.cpu(), a) < RELATIVE_ERROR
    assert relative_error(logits[1][1].cpu(), logits[1][0].cpu()) > 0.05
