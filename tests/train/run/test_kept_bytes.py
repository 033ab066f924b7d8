"""What the planner says a layer keeps for backward, against what autograd really keeps."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import torch

from mxn.train.kept import PIECE_BYTES
from mxn.train.plan.memory import kept_bytes as planned_bytes
from mxn.train.run.chains import Workload, chains_of, made_up_batch, make_chain
from mxn.train.run.layer_times import Effort, kept_bytes, time_chain
from mxn.train.run.measure_rank import updates
from mxn.train.run.net.losses import PIECE_BYTES as LOSS_PIECE_BYTES
from mxn.train.run.weights import ModelSource
from mxn.train.shapes import model_shape
from support import tiny

if TYPE_CHECKING:
    from mxn.train.run.job import Job

TOKENS, ROWS = 64, 2
CASES = (
    "llama3", "mistral", "qwen2_moe", "qwen3", "mixtral", "deepseek_v3", "deepseek_v2-lite",
    "gemma2", "gemma3", "olmo2",
)  # fmt: skip


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_kept_bytes_are_what_autograd_keeps(case, dtype, is_packed, tmp_path):
    tiny.write(case, tmp_path)
    source = ModelSource.open(tmp_path, seq_tokens=TOKENS)
    work = Workload(
        spec=source.spec, names=source.family.names, biases=source.biases, seq_tokens=TOKENS,
        dtype=dtype, is_packed=is_packed,
    )  # fmt: skip
    shape = model_shape(source.spec, name=case, seq_tokens=TOKENS, dtype=dtype, is_packed=is_packed)
    told = {layer.kind: layer.activation_bytes * ROWS * TOKENS for layer in shape.layers}
    for kind, layers in chains_of(source.spec).items():
        chain = make_chain(work, layers, ROWS, torch.device("cpu"), lambda stage: None)
        assert told[kind] == pytest.approx(kept_bytes(chain) / chain.num_layers, rel=0.05), kind


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama3", "gemma2", "deepseek_v2-lite"])
def test_recomputation_keeps_what_the_planner_says(case, dtype, recompute, tmp_path):
    tiny.write(case, tmp_path)
    source = ModelSource.open(tmp_path, seq_tokens=TOKENS)
    work = Workload(
        spec=source.spec, names=source.family.names, biases=source.biases, seq_tokens=TOKENS,
        dtype=dtype, is_packed=False,
    )  # fmt: skip
    shape = model_shape(source.spec, name=case, seq_tokens=TOKENS, dtype=dtype)
    last = shape.num_layers - 1
    for first, end in ((last - 1, last), (last, last + 1)):  # a block, the head
        chain = make_chain(work, (first, end), ROWS, torch.device("cpu"), lambda stage: None)
        stage = source.empty_stage(
            first, end, dtype=getattr(torch, dtype), device=torch.device("cpu"),
            recompute=recompute,
        )  # fmt: skip
        told = planned_bytes(shape.layers[first], ROWS * TOKENS, 1, recompute)
        # MLA's keys and values are parts of larger tensors, which stay whole.
        assert told == pytest.approx(kept_bytes(replace(chain, module=stage)), rel=0.06)


def test_the_loss_is_cut_into_the_pieces_that_the_shape_knows_of():
    assert PIECE_BYTES == LOSS_PIECE_BYTES


def test_a_chain_is_the_longest_run_of_a_kind(tmp_path):
    tiny.write("gemma3", tmp_path)  # five layers with a window, one without, one with
    spec = ModelSource.open(tmp_path, seq_tokens=TOKENS).spec
    assert chains_of(spec) == {
        "embedding": (0, 1), "block.window": (1, 5), "block": (6, 7), "head": (8, 9),
    }  # fmt: skip


def test_a_made_up_packed_batch_holds_two_documents_that_do_not_meet(tmp_path):
    tiny.write("llama2", tmp_path)
    source = ModelSource.open(tmp_path, seq_tokens=8)
    work = Workload(
        spec=source.spec, names=source.family.names, biases=source.biases, seq_tokens=8,
        dtype="float32", is_packed=True,
    )  # fmt: skip
    batch = made_up_batch(work, 3, torch.Generator().manual_seed(0))
    assert batch.is_packed
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.num_tokens == int((batch.labels >= 0).sum()) == 3 * 6


def test_a_measured_chain_in_16_bit_is_freed(tmp_path):
    """Hooks of its sums held its parameters for good: memory grew with each round."""
    tiny.write("qwen3", tmp_path)
    source = ModelSource.open(tmp_path, seq_tokens=TOKENS)
    work = Workload(
        spec=source.spec, names=source.family.names, biases=source.biases, seq_tokens=TOKENS,
        dtype="bfloat16", is_packed=False,
    )  # fmt: skip
    job = cast("Job", SimpleNamespace(lora=None))
    chain = make_chain(
        work, chains_of(source.spec)["block"], ROWS, torch.device("cpu"),
        lambda stage: updates(stage, job),
    )  # fmt: skip
    time_chain(chain, Effort(blocks=1, block_s=0.0, warmup_s=0.0), synchronize=lambda: None)
    parameter = weakref.ref(chain.weights[0])
    gc.disable()  # what counts is what goes by itself
    try:
        del chain
        assert parameter() is None
    finally:
        gc.enable()
