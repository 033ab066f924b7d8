"""AdamW against torch's, sums in float32, and state that moves between plans."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mxn.errors import ConfigError, UserError
from mxn.train.run import optim
from mxn.train.run.optim import AdamSettings, AdamW, GradientSums, clip_factor, trainable
from mxn.train.run.weights import ModelSource
from support import tiny
from support.training import random_batch, relative, whole_stage

ADAM = AdamSettings()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama3")
    tiny.write("llama3", folder)  # tied
    return ModelSource.open(folder, seq_tokens=32)


def test_steps_are_those_of_torch(source):
    ours, theirs = whole_stage(source), whole_stage(source)
    sums, optimizer = GradientSums(ours), AdamW(ours, ADAM)
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95),
    )  # fmt: skip
    for seed in range(4):
        batch = random_batch(seed=seed)
        sums.clear()
        ours(None, batch).backward()
        optimizer.step(sums, 1e-2, scale=1 / batch.num_tokens)
        reference.zero_grad()
        (theirs(None, batch) / batch.num_tokens).backward()
        reference.step()
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative(got, want) < 1e-5


def random_steps(source, piece_values, monkeypatch):
    """Three steps of AdamW on made-up gradients; return all state and the largest new tensor."""
    monkeypatch.setattr(optim, "PIECE_VALUES", piece_values)
    stage = whole_stage(source)
    sums, optimizer = GradientSums(stage), AdamW(stage, ADAM)
    generator = torch.Generator().manual_seed(1)
    largest = LargestNew()
    for _ in range(3):
        for key in sums:
            sums[key].normal_(generator=generator)
        with largest:
            optimizer.step(sums, 1e-2, scale=0.3)
    layers = range(source.num_layers)
    return [t for layer in layers for t in optimizer.layer_state(layer).values()], largest.values


class LargestNew(TorchDispatchMode):
    """Counts the values of tensors that operators make, but for views and work in place."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and func._schema.returns[0].alias_info is None:
            self.values = max(self.values, out.numel())
        return out


def test_an_update_piece_by_piece_is_the_same_to_the_bit_and_takes_little_memory(
    source, monkeypatch
):
    whole, before = random_steps(source, 1 << 30, monkeypatch)
    pieces, largest = random_steps(source, 1000, monkeypatch)
    assert all(map(torch.equal, whole, pieces))
    assert largest <= 1000 < before


def test_a_shared_matrix_is_updated_once(source):
    stage = whole_stage(source)
    keys = list(trainable(stage))
    assert (0, "model.embed_tokens.weight") in keys
    assert not any(name == "lm_head.weight" for _, name in keys)
    state = AdamW(stage, ADAM).layer_state(source.num_layers - 1)
    assert "lm_head.weight.exp_avg" in state  # as a plan that parts them needs it


def test_bfloat16_sums_and_masters_are_float32(source):
    stage = whole_stage(source, dtype=torch.bfloat16)
    sums, optimizer = GradientSums(stage), AdamW(stage, ADAM)
    batches = [random_batch(seed=seed) for seed in range(3)]
    each = []
    for batch in batches:
        sums.clear()
        stage(None, batch).backward()
        each.append({key: sums[key].clone() for key in sums})
    sums.clear()
    for batch in batches:
        stage(None, batch).backward()
    for key in sums:
        assert sums[key].dtype == torch.float32
        assert torch.equal(sums[key], each[0][key] + each[1][key] + each[2][key])
    assert all(parameter.grad is None for parameter in stage.parameters())

    # Steps too small for bfloat16 add up in the masters.
    name = "model.layers.0.self_attn.q_proj.weight"
    before = stage.layer_state(1)[name].clone()
    for _ in range(3):
        optimizer.step(sums, 1e-6)
    master = optimizer.master_state(1)[name]
    assert torch.equal(stage.layer_state(1)[name], master.bfloat16())
    assert (master - before.float()).abs().max() > 2e-6


def test_state_moves_to_another_plan_and_training_goes_on_alike(source):
    batches = [random_batch(seed=seed) for seed in range(4)]

    def step(stages, optimizers, sums, batch) -> None:
        for total in sums:
            total.clear()
        inputs, x = [], None
        for stage in stages:
            x = stage(x, batch)
            inputs.append((x, leaf := x.detach().requires_grad_()))
            x = leaf
        inputs[-1][0].backward()
        for out, leaf in reversed(inputs[:-1]):
            out.backward(leaf.grad)
        first, last = sums[0], sums[-1]
        if len(stages) > 1:  # tied: both copies get the sum
            embedding = first[0, "model.embed_tokens.weight"]
            head = last[source.num_layers - 1, "lm_head.weight"]
            total = embedding + head
            embedding.copy_(total)
            head.copy_(total)
        for optimizer, total in zip(optimizers, sums, strict=True):
            optimizer.step(total, 1e-2, scale=1 / batch.num_tokens)

    whole = [whole_stage(source)]
    whole_sums, whole_adam = [GradientSums(whole[0])], [AdamW(whole[0], ADAM)]
    for batch in batches[:2]:
        step(whole, whole_adam, whole_sums, batch)

    parts = [source.stage(0, 2), source.stage(2, source.num_layers)]
    sums, adam = [GradientSums(p) for p in parts], [AdamW(p, ADAM) for p in parts]
    for part, optimizer in zip(parts, adam, strict=True):
        optimizer.num_steps = whole_adam[0].num_steps
        for layer in range(part.first, part.end):
            part.load_layer_state(layer, whole[0].layer_state(layer))
            optimizer.load_layer_state(layer, whole_adam[0].layer_state(layer))
    for batch in batches[2:]:
        step(whole, whole_adam, whole_sums, batch)
        step(parts, adam, sums, batch)
    for part in parts:
        for layer in range(part.first, part.end):
            want = whole[0].layer_state(layer)
            for name, tensor in part.layer_state(layer).items():
                assert relative(tensor, want[name]) < 1e-5, name


def test_a_part_of_the_parameters_can_be_updated_elsewhere(source):
    stage = source.stage(1, 3)
    halves = [AdamW(stage, ADAM, owns=lambda key, part=part: key[0] % 2 == part) for part in (0, 1)]
    assert halves[0].layer_state(1) == {}
    assert halves[1].layer_state(2) == {}
    assert len(halves[1].layer_state(1)) == 3 * len(stage.layer_state(1))


def test_a_state_of_another_model_is_refused(source):
    optimizer = AdamW(source.stage(1, 2), ADAM)
    state = optimizer.layer_state(1)
    name = sorted(state)[0]
    with pytest.raises(UserError, match="missing"):
        optimizer.load_layer_state(1, {k: v for k, v in state.items() if k != name})
    with pytest.raises(UserError, match="in the optimizer state"):
        optimizer.load_layer_state(1, {**state, name: state[name][None]})


def test_the_norm_counts_what_it_is_asked_to(source):
    stage = source.stage(1, 3)
    sums = GradientSums(stage)
    for key in sums:
        sums[key].fill_(2.0)
    count = sum(parameter.numel() for parameter in stage.parameters())
    assert sums.square_norm().item() == pytest.approx(4.0 * count)
    one = sum(parameter.numel() for parameter in stage.layer_parameters(1).values())
    assert sums.square_norm(lambda key: key[0] == 1).item() == pytest.approx(4.0 * one)
    assert sums.square_norm(lambda key: False).item() == 0.0
    assert sums.layer(1).keys() == stage.layer_parameters(1).keys()


def test_clipping():
    assert clip_factor(2.0, None) == 1.0
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, 1.0) == 0.25
    for norm in (math.nan, math.inf):
        with pytest.raises(UserError, match="diverged"):
            clip_factor(norm, None)


@pytest.mark.parametrize(
    "options", [{"beta1": 1.0}, {"beta2": -0.1}, {"eps": 0}, {"weight_decay": -1}]
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(ConfigError):
        AdamSettings(**options)
