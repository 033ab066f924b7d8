"""Blocks cut over a team give the losses and gradients of whole ones, for every kind of block."""

from __future__ import annotations

import pytest
import torch

from mxn.errors import UnsupportedError, UserError
from mxn.train.run.lora import LoraSettings, attach
from mxn.train.run.net.shard import Cut
from mxn.train.run.optim import AdamSettings, AdamW, GradientSums
from mxn.train.run.weights import ModelSource
from support import tiny
from support.threads import run_team
from support.training import random_batch, relative, whole_stage

CLOSE = 2e-5  # sums of another order; an error in a gradient is a hundred times more
# Biases, fused and grouped matrices, norms of heads and over all heads, windows and soft-caps,
# latents with experts behind one and two of them, shared experts with a gate.
KINDS = ["llama3", "llama-bias", "phi3", "internlm2", "qwen3", "olmo2", "gemma2", "mixtral",
         "qwen2_moe", "deepseek_v2-lite", "deepseek_v3"]  # fmt: skip


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    def open_(case: str) -> ModelSource:
        folder = tmp_path_factory.mktemp(case)
        tiny.write(case, folder)
        return ModelSource.open(folder, seq_tokens=64)

    return open_


def learn(source, team, *, lora=None, steps=1, **options):
    """Return losses, whole gradients of the last step and whole state after it."""
    stage = whole_stage(source, team=team, **options)
    if lora is not None:
        attach(stage, lora, seed=1)
    sums, optimizer = GradientSums(stage), AdamW(stage, AdamSettings())
    losses, batch = [], random_batch()
    for _ in range(steps):
        sums.clear()
        loss = stage(None, batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step(sums, 1e-2, scale=1 / batch.num_tokens)
    gradients, state = {}, {}
    for layer in range(source.num_layers):
        gradients |= stage.whole_of(layer, sums.layer(layer))
        state |= optimizer.whole_layer_state(layer)
    return losses, {name: g.clone() for name, g in gradients.items()}, state


def assert_same(members, want) -> None:
    for losses, gradients, state in members:
        assert losses == pytest.approx(want[0], rel=1e-6)
        assert gradients.keys() == want[1].keys()
        for name, gradient in want[1].items():
            assert gradient.shape == gradients[name].shape
            assert relative(gradients[name], gradient) < CLOSE, name
            # What all have must be the same bits, or ranks drift apart.
            assert torch.equal(gradients[name], members[0][1][name]), name
        assert state.keys() == want[2].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_team_learns_what_one_device_learns(kind, opened):
    source = opened(kind)
    want = learn(source, None)
    assert_same(run_team(2, lambda team: learn(source, team)), want)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_again_is_summed_again(recompute, opened):
    source = opened("llama3")
    members = run_team(2, lambda team: learn(source, team, recompute=recompute))
    assert_same(members, learn(source, None))


@pytest.mark.parametrize("kind", ["llama-bias", "qwen2_moe", "deepseek_v3"])
def test_adapters_of_a_team_learn_what_those_of_one_device_learn(kind, opened):
    source, lora = opened(kind), LoraSettings(rank=4)
    want = learn(source, None, lora=lora, steps=2)  # in the first, B is zero and A learns nothing
    assert_same(run_team(2, lambda team: learn(source, team, lora=lora, steps=2)), want)


def test_a_block_sums_once_per_half_and_direction(opened):
    source = opened("llama3")

    def count(team):
        stage = source.stage(1, 3, team=team)
        x = torch.randn(2, 29, source.spec.hidden, generator=torch.Generator().manual_seed(1))
        out = stage(x.requires_grad_(), random_batch())
        forward = team.num_sums
        out.sum().backward()
        return forward, team.num_sums - forward

    assert run_team(2, count) == [(4, 4), (4, 4)]


def test_optimizer_state_moves_between_widths(opened):
    source = opened("phi3")
    state = learn(source, None)[2]

    def load(team):
        stage = whole_stage(source, team=team)
        optimizer, found = AdamW(stage, AdamSettings()), {}
        for layer in range(source.num_layers):
            names = optimizer.layer_state(layer)
            optimizer.load_layer_state(layer, {name: state[name] for name in names})
            found |= optimizer.whole_layer_state(layer)
        return found, sum(p.numel() for p in stage.parameters())

    whole = sum(p.numel() for p in whole_stage(source).parameters())
    for found, held in run_team(2, load):
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
        assert held < whole


def test_state_of_another_shape_is_refused(opened):
    source = opened("llama3")

    def load(team):
        stage = source.stage(1, 2, team=team)
        name = next(iter(stage.layer_cuts(1)))
        with pytest.raises(UserError, match="of layer 1 is"):
            stage.part_of(1, {name: torch.zeros(3, 3)})
        return True

    assert run_team(2, load) == [True, True]


@pytest.mark.parametrize(
    ("size", "words"), [(4, "2 key/value heads .* tensor parallelism of 4"), (3, "attention|heads")]
)
def test_heads_that_cannot_be_shared_out_are_refused(size, words, opened):
    source = opened("llama3")

    def build(team):
        with pytest.raises(UnsupportedError, match=words):
            source.empty_stage(0, 2, team=team)
        return True

    assert all(run_team(size, build))


def test_parts_of_fused_sections_make_the_whole():
    whole = torch.arange(2 * 12.0).view(12, 2)
    cut = Cut(0, (2, 3, 1))
    parts = [cut.part(whole, index, 2) for index in range(2)]
    assert [int(row) // 2 for row in parts[1][:, 0]] == [2, 3, 7, 8, 9, 11]
    assert torch.equal(cut.whole(parts), whole)
    placed = torch.zeros_like(whole)
    for index, part in enumerate(parts):
        cut.put(placed, part, index, 2)
    assert torch.equal(placed, whole)
    assert cut.whole_shape(parts[0].shape, 2) == (12, 2)
