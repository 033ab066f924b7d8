"""Cutting, packing and recomputation change what is kept where, and not what is learned."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from mxn.errors import UserError
from mxn.train.run.data import IGNORED, MicroBatch
from mxn.train.run.net import losses
from mxn.train.run.weights import ModelSource
from support import tiny
from support.training import gradients, random_batch, random_ids, relative, whole_stage

CLOSE = 5e-6
# One of each kind of layer: plain, windows and soft-caps, latents and experts, norms behind.
KINDS = ["llama3", "gemma2", "deepseek_v3", "olmo2"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    found = {}
    for case in KINDS:
        folder = tmp_path_factory.mktemp(case)
        tiny.write(case, folder)
        found[case] = ModelSource.open(folder, seq_tokens=64)
    return found


@pytest.fixture(params=KINDS)
def source(request, sources):
    return sources[request.param]


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert relative(got[name], gradient) < CLOSE, name


def test_a_model_in_pieces_learns_what_it_learns_whole(source):
    batch = random_batch()
    whole = whole_stage(source)
    loss = whole(None, batch)
    loss.backward()
    cuts = [0, 1, 3, source.num_layers - 1, source.num_layers]
    stages = [source.stage(first, end) for first, end in pairwise(cuts)]

    inputs, x = [], None
    for stage in stages:
        x = stage(x, batch)
        inputs.append(x)
        if stage is not stages[-1]:
            x = x.detach().requires_grad_()
            inputs[-1] = (inputs[-1], x)
    assert inputs[-1].item() == loss.item()
    inputs[-1].backward()
    for out, following in reversed(inputs[:-1]):
        out.backward(following.grad)
    assert_same(gradients(stages), gradients([whole]))


def test_documents_in_one_row_do_not_see_each_other(source):
    lengths = [9, 20, 1, 12]
    documents = [random_ids(1, n + 1, seed=n) for n in lengths]
    alone, packed = whole_stage(source), whole_stage(source)
    want = 0.0
    for ids in documents:
        one = MicroBatch.of_rows(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss = alone(None, one)
        loss.backward()
        want += loss.item()
    row = MicroBatch(
        ids=torch.cat([ids[:, :-1] for ids in documents], 1),
        labels=torch.cat([ids[:, 1:] for ids in documents], 1),
        positions=torch.cat([torch.arange(n) for n in lengths])[None],
        segments=torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None].int(),
        num_tokens=sum(lengths),
    )
    loss = packed(None, row)
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=1e-6)
    assert_same(gradients([packed]), gradients([alone]))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_gives_the_same_gradients(source, recompute):
    batch = random_batch()
    plain, again = whole_stage(source), whole_stage(source, recompute=recompute)
    losses = [stage(None, batch) for stage in (plain, again)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    assert_same(gradients([again]), gradients([plain]))


def test_full_recomputation_keeps_less(sources):
    def kept(recompute: str) -> int:
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        stage = sources["llama3"].stage(1, 3, recompute=recompute)
        x = torch.zeros(2, 29, 48, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            stage(x, random_batch())
        return total

    assert kept("full") < 0.2 * kept("none")


def test_the_loss_in_pieces_is_the_loss_at_once(source, monkeypatch):
    batch = random_batch()
    at_once, in_pieces = whole_stage(source), whole_stage(source)
    loss = at_once(None, batch)
    loss.backward()
    monkeypatch.setattr(losses, "PIECE_BYTES", 4 * tiny.VOCAB * 7)  # seven rows
    pieces = in_pieces(None, batch)
    pieces.backward()
    assert pieces.item() == pytest.approx(loss.item(), rel=1e-6)
    assert_same(gradients([in_pieces]), gradients([at_once]))


def test_tokens_without_a_label_add_nothing(source):
    batch = random_batch()
    labels = batch.labels.clone()
    labels[:, ::2] = IGNORED
    fewer = replace(batch, labels=labels, num_tokens=int((labels != IGNORED).sum()))
    stage = whole_stage(source)
    logits = stage.logits(None, batch)
    want = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    assert stage(None, fewer).item() == pytest.approx(want.item(), rel=1e-6)


def test_a_batch_without_any_label_has_loss_and_gradients_of_zero(source):
    batch = random_batch()
    empty = replace(batch, labels=torch.full_like(batch.labels, IGNORED), num_tokens=0)
    stage = whole_stage(source)
    loss = stage(None, empty)
    loss.backward()
    assert loss.item() == 0.0
    assert all(gradient.abs().sum() == 0 for gradient in gradients([stage]).values())


def test_state_moves_between_cuts(sources):
    source = sources["llama3"]
    whole = whole_stage(source)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(1.0)
    last = source.stage(2, source.num_layers)
    for layer in range(2, source.num_layers):
        last.load_layer_state(layer, whole.layer_state(layer))
    assert torch.equal(last.head.weight, whole.embedding.weight)  # tied: the copy is given too
    assert last.tied_copy is last.head.weight
    assert whole.tied_copy is None


def test_a_state_that_does_not_fit_is_refused(sources):
    stage = sources["llama3"].stage(1, 2)
    state = stage.layer_state(1)
    name = next(iter(state))
    with pytest.raises(UserError, match="lacks"):
        stage.load_layer_state(1, {k: v for k, v in state.items() if k != name})
    with pytest.raises(UserError, match="unknown"):
        stage.load_layer_state(1, {**state, "other": state[name]})
    with pytest.raises(UserError, match=r"is \(1, 48\), the model's is \(48,\)"):
        stage.load_layer_state(1, {**state, name: state[name][None]})
    with pytest.raises(UserError, match="not on this stage"):
        stage.layer_state(2)


def test_a_chunk_outside_of_the_model_is_refused(sources):
    with pytest.raises(UserError, match="model of 5 layers"):
        sources["llama3"].empty_stage(3, 6)
    with pytest.raises(UserError, match="needs hidden states"):
        sources["llama3"].stage(1, 2)(None, random_batch())


def test_neighbours_may_compute_in_different_dtypes(sources):
    source, batch = sources["llama3"], random_batch()
    want = whole_stage(source)(None, batch).item()
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        first = source.stage(0, 3, dtype=dtypes[0])
        last = source.stage(3, source.num_layers, dtype=dtypes[1])
        out = first(None, batch)
        x = out.detach().requires_grad_()
        loss = last(x, batch)
        loss.backward()
        out.backward(x.grad)
        assert (out.dtype, x.grad.dtype, loss.dtype) == (dtypes[0], dtypes[0], torch.float32)
        assert loss.item() == pytest.approx(want, rel=0.02)
        assert all(gradient.isfinite().all() for gradient in gradients([first, last]).values())
