"""LoRA: one step as PEFT makes it, files that PEFT and the engine read, merged weights."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers

from mxn.errors import ConfigError, UnsupportedError
from mxn.models.lora_files import read_adapter
from mxn.models.merged import MergedCheckpoint
from mxn.train.run.export import export_adapter, export_model
from mxn.train.run.lora import LoraSettings, attach, check_targets, merged
from mxn.train.run.optim import AdamSettings, AdamW, GradientSums, trainable
from mxn.train.run.weights import ModelSource
from support import tiny
from support.training import random_batch, relative, whole_stage

SETTINGS = LoraSettings(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))


@pytest.fixture
def source(tmp_path):
    tiny.write("llama3", tmp_path / "base")
    return ModelSource.open(tmp_path / "base", seq_tokens=32)


def adapted(source, settings=SETTINGS, **options):
    stage = whole_stage(source, **options)
    attach(stage, settings, seed=1)
    return stage


def train_once(stage, batch, *, rate: float = 1e-2) -> float:
    sums, optimizer = GradientSums(stage), AdamW(stage, AdamSettings(weight_decay=0.0))
    loss = stage(None, batch)
    loss.backward()
    optimizer.step(sums, rate, scale=1 / batch.num_tokens)
    return loss.item() / batch.num_tokens


def test_adapters_do_nothing_before_they_learn(source):
    batch = random_batch()
    assert torch.equal(adapted(source).logits(None, batch), whole_stage(source).logits(None, batch))


def test_only_adapters_learn(source):
    stage = adapted(source)
    names = [name for _, name in trainable(stage)]
    assert len(names) == 3 * 3 * 2
    assert all(".lora_" in name for name in names)
    before = {name: tensor.clone() for name, tensor in stage.layer_state(1).items()}
    train_once(stage, random_batch())
    changed = {
        n for n, tensor in stage.layer_state(1).items() if not torch.equal(tensor, before[n])
    }
    # A has no gradient yet: B is zero in the first step.
    assert changed == {name for name in before if ".lora_B" in name}


def test_three_steps_give_the_adapter_that_peft_gives(source, tmp_path):
    stage = adapted(source)
    base = transformers.AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(SETTINGS.targets), task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base, config)
    own = {n: t for i in range(source.num_layers) for n, t in stage.layer_state(i).items()}
    wanted = {
        name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad
    }
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(own[_plain(name)])
    optimizer = torch.optim.AdamW(wanted.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    sums, ours = GradientSums(stage), AdamW(stage, AdamSettings(weight_decay=0.0))
    for seed in range(3):
        batch = random_batch(seed=seed)
        sums.clear()
        stage(None, batch).backward()
        ours.step(sums, 1e-2, scale=1 / batch.num_tokens)
        optimizer.zero_grad()
        theirs(batch.ids, labels=batch.ids).loss.backward()
        optimizer.step()
    for name, parameter in wanted.items():
        assert relative(own[_plain(name)], parameter) < 1e-4, name


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default.", ".")


def test_an_exported_adapter_is_read_by_peft_and_by_the_engine(source, tmp_path):
    stage = adapted(source)
    batch = random_batch()
    for seed in range(2):
        train_once(stage, random_batch(seed=seed))
    want = stage.logits(None, batch).detach()
    modules = export_adapter(source, stage.layer_state, tmp_path / "adapter", SETTINGS)
    assert len(modules) == 9
    assert read_adapter(tmp_path / "adapter").rank == 4
    base = transformers.AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert relative(model(batch.ids).logits.detach(), want) < 1e-5

    export_model(source, stage.layer_state, tmp_path / "merged", lora=SETTINGS)
    whole = whole_stage(ModelSource.open(tmp_path / "merged", seq_tokens=32))
    assert relative(whole.logits(None, batch).detach(), want) < 1e-5
    name = "model.layers.0.self_attn.q_proj.weight"
    by_engine = MergedCheckpoint(source.folder, tmp_path / "adapter").read(name)
    assert relative(merged(stage.layer_state(1), SETTINGS)[name], by_engine) < 1e-6


@pytest.mark.parametrize("case", ["deepseek_v3", "qwen2_moe", "mixtral", "phi3", "internlm2"])
def test_all_linear_is_what_the_engine_adapts(case, tmp_path):
    from mxn.chips import find_device
    from mxn.models.load import load_model
    from mxn.models.lora import AdaptedModel

    tiny.write(case, tmp_path / "base")
    source = ModelSource.open(tmp_path / "base", seq_tokens=32)
    settings = LoraSettings(rank=2, alpha=4.0)
    stage = adapted(source, settings)
    train_once(stage, random_batch())
    modules = export_adapter(source, stage.layer_state, tmp_path / "adapter", settings)
    assert not any(".experts." in module for module in modules)
    model = load_model(source.folder, find_device("cpu"), "float32").model
    AdaptedModel(model).install(1, read_adapter(tmp_path / "adapter"))


def test_the_cut_does_not_decide_how_adapters_begin(source):
    whole, part = adapted(source), source.stage(2, 4)
    attach(part, SETTINGS, seed=1)
    want = whole.layer_state(3, trainable_only=True)
    assert want
    for name, tensor in part.layer_state(3, trainable_only=True).items():
        assert torch.equal(tensor, want[name])


def test_a_stage_with_nothing_to_learn_has_a_backward_pass(source):
    stage = source.stage(0, 1)
    assert attach(stage, SETTINGS, seed=1) == []
    out = stage(None, random_batch())
    out.backward(torch.ones_like(out))
    assert list(GradientSums(stage)) == []
    AdamW(stage, AdamSettings()).step(GradientSums(stage), 1e-2)


def test_bfloat16_adapters_keep_float32_masters(source):
    stage = adapted(source, dtype=torch.bfloat16)
    optimizer = AdamW(stage, AdamSettings())
    masters = optimizer.layer_state(1)
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
    assert len(masters) == 3 * 2 * 3


def test_settings_and_targets_that_cannot_be_are_refused(source):
    with pytest.raises(ConfigError, match="rank"):
        LoraSettings(rank=0)
    with pytest.raises(ConfigError, match="target"):
        LoraSettings(targets=())
    modules = attach(whole_stage(source), SETTINGS, seed=0)
    with pytest.raises(UnsupportedError, match=r"'query'.*down_proj, q_proj, v_proj"):
        check_targets(LoraSettings(targets=("q_proj", "query")), modules)
    with pytest.raises(UnsupportedError, match="tied to the embedding"):
        attach(whole_stage(source), LoraSettings(targets=("lm_head",)), seed=0)
