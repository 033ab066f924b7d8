"""What the planner says one device of a cut stage holds, against what it really holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from mxn.train.plan.memory import FLOAT32, MIXED, SAVED_BYTES, flight_bytes
from mxn.train.run.chains import Workload, chains_of, made_up_batch, make_chain
from mxn.train.run.checkpoint import Checkpointer, Position, find
from mxn.train.run.checkpoint.writer import Identity
from mxn.train.run.executor import AHEAD
from mxn.train.run.layer_times import kept_bytes
from mxn.train.run.optim import AdamSettings, AdamW, trainable
from mxn.train.run.weights import ModelSource
from mxn.train.shapes import biases_of, model_shape
from support import tiny

TOKENS, ROWS = 64, 2


@dataclass(frozen=True)
class Alone:
    """A team whose other ranks have nothing to add: enough for sizes."""

    size: int
    index: int = 0

    def add(self, tensor: Tensor) -> None: ...

    def gather(self, part: Tensor) -> list[Tensor]:
        return [part] * self.size


def opened(case, folder, dtype="float32"):
    model = tiny.write(case, folder)
    source = ModelSource.open(folder, seq_tokens=TOKENS)
    shape = model_shape(
        source.spec, name=case, seq_tokens=TOKENS, dtype=dtype,
        biases=biases_of(source.family.name, model.config),
    )  # fmt: skip
    return source, shape


@pytest.mark.parametrize("case", ["llama3", "qwen2", "qwen3", "mixtral", "deepseek_v3", "gemma2"])
def test_parameters_of_one_of_two_are_those_that_it_has(case, tmp_path):
    source, shape = opened(case, tmp_path)
    for number, layer in enumerate(shape.layers):
        stage = source.empty_stage(number, number + 1, device="meta", team=Alone(2))
        held = sum(p.numel() for p in stage.layer_parameters(number).values())
        assert layer.params_on(2) == held, layer.kind
        assert layer.params_on(1) == layer.params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama3", "mixtral", "gemma2", "deepseek_v3"])
def test_activations_of_one_of_two_are_those_that_it_keeps(case, dtype, tmp_path):
    source, shape = opened(case, tmp_path, dtype)
    work = Workload(
        spec=source.spec, names=source.family.names, biases=source.biases, seq_tokens=TOKENS,
        dtype=dtype, is_packed=False,
    )  # fmt: skip
    for kind, (first, _) in chains_of(source.spec).items():
        chain = make_chain(work, (first, first + 1), ROWS, torch.device("cpu"), lambda stage: None)
        stage = source.empty_stage(
            first, first + 1, dtype=getattr(torch, dtype), team=Alone(2)
        )  # fmt: skip
        told = shape.layers[first].kept_on(2) * ROWS * TOKENS
        assert told == pytest.approx(kept_bytes(replace(chain, module=stage)), rel=0.1), kind


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_micro_batch_in_flight_holds_its_input_and_its_output_too(dtype, recompute, tmp_path):
    """As `executor` keeps it: the graph, what came in, what goes out."""
    source, shape = opened("llama3", tmp_path, dtype)
    work = Workload(
        spec=source.spec, names=source.family.names, biases=source.biases, seq_tokens=TOKENS,
        dtype=dtype, is_packed=False,
    )  # fmt: skip
    stage = source.empty_stage(1, 3, dtype=getattr(torch, dtype), recompute=recompute)
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter)
    batch = made_up_batch(work, ROWS, torch.Generator().manual_seed(0))
    x = torch.randn(ROWS, TOKENS, source.spec.hidden, dtype=getattr(torch, dtype))
    x.requires_grad_()
    outside = {t.untyped_storage().data_ptr() for t in stage.parameters()}
    outside |= {
        t.untyped_storage().data_ptr() for t in vars_of(batch).values() if isinstance(t, Tensor)
    }
    alive: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        alive.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = stage(x, batch)
    note(x), note(out)
    really = sum(t.untyped_storage().nbytes() for at, t in alive.items() if at not in outside)
    tokens = ROWS * TOKENS
    border = shape.layers[1].output_bytes * tokens
    kept = sum(
        layer.kept_on(1) * tokens if recompute == "none" else border for layer in shape.layers[1:3]
    )
    model = FLOAT32 if dtype == "float32" else MIXED
    told = flight_bytes(kept, border, border, recompute, model)
    assert told == pytest.approx(really, rel=0.05)
    assert kept < 0.99 * really


def vars_of(batch):
    return {name: getattr(batch, name) for name in batch.__dataclass_fields__}


def test_there_are_as_many_buffers_as_the_runner_posts():
    assert FLOAT32.messages == MIXED.messages == AHEAD + 2  # one in use, one that leaves


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_save_leaves_as_many_bytes_as_the_planner_counts(dtype, tmp_path):
    """The embedding is the head too: one copy."""
    source, _ = opened("llama3", tmp_path, dtype)
    stage = source.empty_stage(0, source.num_layers, dtype=getattr(torch, dtype))
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter)
    optimizer = AdamW(stage, AdamSettings())
    identity = Identity(
        job="j", plan="p", plan_json="{}", num_layers=source.num_layers, num_ranks=1, launch=1
    )
    writer = Checkpointer(tmp_path / "checkpoints", rank=0, identity=identity, keep=1)
    for step in (1, 2):
        layers = {layer: optimizer.layer_state(layer) for layer in range(source.num_layers)}
        writer.save(Position(step=step, micro_batch=0), layers)
    writer.close()
    kept = sum(buffer.nbytes for buffer in writer._buffers.values())
    assert kept == SAVED_BYTES * sum(p.numel() for p in trainable(stage).values())
    stored = find(tmp_path / "checkpoints", "newest")
    for layer in range(source.num_layers):
        for name, tensor in stored.layer(layer).items():
            assert torch.equal(tensor, optimizer.layer_state(layer)[name])
