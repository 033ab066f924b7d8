"""Weights in and out: read by layer, drawn by name, exported for transformers and the engine."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mxn.chips import find_device
from mxn.errors import ConfigError, InternalError, NotFoundError, UnsupportedError
from mxn.models.load import load_model
from mxn.train.run.export import export_model
from mxn.train.run.weights import ModelSource
from support import packers, tiny
from support.paged import Session
from support.training import LLAMA, random_batch, relative, whole_stage


def write(case: str, folder, *, seq_tokens: int = 32, **options) -> ModelSource:
    tiny.write(case, folder)
    return ModelSource.open(folder, seq_tokens=seq_tokens, **options)


@pytest.mark.parametrize("case", ["llama3", "qwen2", "phi3", "gemma3", "mixtral", "deepseek_v3"])
def test_an_export_is_read_by_transformers_and_by_the_engine(case, tmp_path):
    source = write(case, tmp_path / "in")
    stage = whole_stage(source)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.mul_(1.01)
    export_model(source, stage.layer_state, tmp_path / "out", shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2

    batch = random_batch(1, 23)
    want = stage.logits(None, batch).detach()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert relative(model(batch.ids).logits.detach(), want) < 1e-5
    loaded = load_model(tmp_path / "out", find_device("cpu"), "float32", allow_fallback=False)
    assert loaded.unused_tensors == ()
    with torch.inference_mode():
        got = Session(loaded.model).step({0: batch.ids[0].tolist()})[0]
    assert relative(got, want[0]) < 1e-5


def test_an_export_has_the_names_and_dtypes_of_its_origin(tmp_path):
    source = ModelSource.open(LLAMA, seq_tokens=64)
    num_bytes = export_model(source, whole_stage(source).layer_state, tmp_path / "out")
    old, new = load_file(LLAMA / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert num_bytes == sum(tensor.numel() * 2 for tensor in new.values())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (LLAMA / name).read_bytes()
    assert not (tmp_path / "out" / "training.json").exists()


def test_an_export_never_overwrites_and_leaves_nothing_half_done(tmp_path):
    source = write("llama3", tmp_path / "in")
    stage = whole_stage(source)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        export_model(source, stage.layer_state, tmp_path / "out")
    with pytest.raises(InternalError, match="without a whole"):
        export_model(source, lambda layer: {}, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_drawn_weights_do_not_depend_on_the_cut(tmp_path):
    tiny.write("gemma3", tmp_path)  # tied, norms stored minus one
    source = ModelSource.open(tmp_path, seq_tokens=32, begin="scratch", seed=7)
    whole = whole_stage(source)
    for first, end in ((0, 2), (2, source.num_layers)):
        part = source.stage(first, end)
        for layer in range(first, end):
            want = whole.layer_state(layer)
            for name, tensor in part.layer_state(layer).items():
                assert torch.equal(tensor, want[name]), name
    state = whole.layer_state(1)
    assert state["model.layers.0.self_attn.q_proj.weight"].std().item() == pytest.approx(
        source.initializer_range, rel=0.1
    )
    assert state["model.layers.0.input_layernorm.weight"].abs().max() == 0
    other = ModelSource.open(tmp_path, seq_tokens=32, begin="scratch", seed=8).stage(0, 1)
    assert not torch.equal(other.embedding.weight, whole.embedding.weight)


def test_a_model_from_scratch_has_the_biases_of_its_family(tmp_path):
    for case in ("qwen2", "llama-bias", "glm4", "llama2"):
        read = write(case, tmp_path / case)
        drawn = ModelSource.open(tmp_path / case, seq_tokens=32, begin="scratch")
        assert drawn.biases == read.biases, case
    assert not read.biases


def test_a_family_without_code_in_transformers_cannot_begin_from_scratch(tmp_path):
    write("internlm2", tmp_path)
    with pytest.raises(UnsupportedError, match="begin from scratch"):
        ModelSource.open(tmp_path, seq_tokens=32, begin="scratch")


def test_a_head_of_its_own_wins_over_a_config_that_says_tied(tmp_path):
    write("llama3", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    source = ModelSource.open(tmp_path, seq_tokens=32)
    assert not source.spec.is_tied
    stage = whole_stage(source)
    assert torch.equal(stage.head.weight, head)
    export_model(source, stage.layer_state, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["lm_head.weight"], head)


def test_a_checkpoint_with_weights_nobody_knows_is_refused(tmp_path):
    source = write("llama3", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        weights | {"model.layers.1.self_attn.sinks.weight": torch.zeros(4)},
        tmp_path / "model.safetensors",
    )
    source = ModelSource.open(tmp_path, seq_tokens=32)
    source.stage(0, 2)  # its own layers are as they should be
    with pytest.raises(UnsupportedError, match="sinks"):
        source.stage(2, 3)


def test_what_cannot_be_trained_says_why(tmp_path):
    source = write("llama2", tmp_path / "llama")
    with pytest.raises(UnsupportedError, match=r"rows of 1000 tokens are longer than the 512"):
        ModelSource.open(source.folder, seq_tokens=1000)
    with pytest.raises(NotFoundError):
        ModelSource.open(tmp_path / "nothing", seq_tokens=8)
    for architecture, reason in (
        ("BertForMaskedLM", "encoder"),
        ("MambaForCausalLM", "no native spec"),
        ("GemmaForCausalLM", "sees what follows|see what follows"),
    ):
        folder = tmp_path / architecture
        shutil.copytree(source.folder, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": [architecture], "use_bidirectional_attention": True}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedError, match=reason):
            ModelSource.open(folder, seq_tokens=8)


def test_a_quantized_checkpoint_is_trained_and_exported_as_plain_numbers(tmp_path):
    reference = tiny.write("llama2", tmp_path / "in")
    stored = load_file(tmp_path / "in/model.safetensors")
    weights = dict(reference.named_parameters())
    for name in [key for key in stored if "_proj.weight" in key]:
        rounded = packers.round_weight(stored.pop(name), 4, 16)
        weights[name].data = rounded.weight
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{part}": t for part, t in packers.awq(rounded).items()}
    save_file(stored, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "in/config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 16}
    (tmp_path / "in/config.json").write_text(json.dumps(config))

    source = ModelSource.open(tmp_path / "in", seq_tokens=32)
    stage, batch = whole_stage(source), random_batch()
    want = reference(batch.ids).logits.detach()
    assert relative(stage.logits(None, batch).detach(), want) < 1e-5
    export_model(source, stage.layer_state, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(model(batch.ids).logits.detach(), want) < 1e-5
