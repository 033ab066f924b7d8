"""LoRA and packed weights: merged before, refused with the way out afterwards."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.test_lora_parity import CASES, TOKENS, logits_of, relative_error, train
from tests.parity import test_quantized_models as quantized

from mxn.chips import find_device
from mxn.engine.config import EngineConfig
from mxn.engine.local import LocalEngine
from mxn.errors import UnsupportedError
from mxn.kernels.native import formats, missing_reason
from mxn.models.load import load_model, pack_model
from mxn.models.merged import MergedCheckpoint
from support import tiny
from support.paged import Session

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))


def packed_logits(directory) -> torch.Tensor:
    model = load_model(directory, find_device("cpu"), "float32").model
    return Session(model).step({0: TOKENS})[0]


@pytest.mark.parametrize(
    "case", ["llama-bias", "qwen3", "phi3", "gemma2", "qwen2_moe", "deepseek_v3"]
)
@torch.inference_mode()
def test_a_merged_adapter_gives_the_logits_of_peft(case, tmp_path):
    reference = tiny.write(case, tmp_path / "base")
    plain = logits_of(reference, TOKENS)
    want = logits_of(train(reference, tmp_path / "adapter", **CASES[case]), TOKENS)
    assert relative_error(plain, want) > 0.05, "the adapter must matter"
    pack_model(
        tmp_path / "base", formats.parse("f32"), tmp_path / "packed", adapter=tmp_path / "adapter"
    )
    assert relative_error(packed_logits(tmp_path / "packed"), want) < 1e-4


@pytest.mark.parametrize("kind", ["gptq-actorder", "w8a8"])
@torch.inference_mode()
def test_what_a_maker_quantized_is_merged_as_what_it_stands_for(kind, tmp_path):
    reference = quantized.write(kind, tmp_path / "base")
    model = train(reference, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    want = logits_of(model, TOKENS)
    pack_model(
        tmp_path / "base", formats.parse("f32"), tmp_path / "packed", adapter=tmp_path / "adapter"
    )
    assert relative_error(packed_logits(tmp_path / "packed"), want) < 1e-4


@pytest.fixture
def folder(tmp_path):
    reference = tiny.write("llama3", tmp_path / "base")
    train(reference, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    return tmp_path


def test_quantized_weights_are_rounded_after_the_sum(folder):
    merged = MergedCheckpoint(folder / "base", folder / "adapter")
    name = "model.layers.0.mlp.down_proj.weight"
    want, plain = merged.read(name), load_raw(folder / "base", name)
    pack_model(
        folder / "base", formats.parse("int8"), folder / "packed", adapter=folder / "adapter"
    )
    model = load_model(folder / "packed", find_device("cpu"), "float32").model
    got = model.parts.layers[0].ffn.down.dequantize()
    assert (got - want).norm() < 0.01 * want.norm() < 0.1 * (got - plain).norm()


def load_raw(directory, name: str) -> torch.Tensor:
    return load_file(directory / "model.safetensors")[name]


def test_modules_that_the_base_does_not_hold_are_named(folder):
    reference = tiny.write("qwen3", folder / "other")
    train(reference, folder / "foreign", target_modules=["q_proj", "lm_head"])
    # llama3's head is the embedding table, which must not change with it.
    with pytest.raises(UnsupportedError, match=r"does not hold 1 of the modules.*: lm_head"):
        MergedCheckpoint(folder / "base", folder / "foreign")


def test_an_adapter_of_another_shape_is_refused_with_both(folder):
    path = folder / "adapter" / "adapter_model.safetensors"
    stored = load_file(path)
    name = next(name for name in stored if "down_proj.lora_A" in name)
    save_file(stored | {name: stored[name][:, :-1].contiguous()}, path)
    with pytest.raises(UnsupportedError, match=r"down_proj.weight as \(48, 79\), .* as \(48, 80\)"):
        pack_model(
            folder / "base", formats.parse("int8"), folder / "out", adapter=folder / "adapter"
        )
    assert not (folder / "out").exists()


def test_packed_weights_refuse_an_adapter_and_name_the_way_out(folder):
    config = EngineConfig(
        model=str(folder / "base"), loader="mxn.engine.testing:load_bytes", device="cpu",
        weights="int8", threads=1, max_sequences=2,
    )  # fmt: skip
    engine = LocalEngine.load(config)
    with pytest.raises(UnsupportedError) as caught:
        engine.load_adapter("poems", str(folder / "adapter"))
    assert "NativeDecoder takes no adapters" in str(caught.value)
    assert "mxn pack --merge-lora" in str(caught.value)
