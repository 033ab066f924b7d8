"""What a stage takes on its devices."""

from dataclasses import replace

import pytest

from mxn.train.plan.costs import largest_share
from mxn.train.plan.memory import (
    FLOAT32,
    SAVED_BYTES,
    MemoryModel,
    anew_bytes,
    in_flight,
    kept_bytes,
    stage_parts,
)
from mxn.train.plan.shape import LayerShape

BLOCK = LayerShape(
    kind="block", params=100, forward_flop=400.0, activation_bytes=100.0, output_bytes=2.0
)


def test_mixed_precision_takes_sixteen_bytes_a_parameter():
    assert MemoryModel().state_bytes == 16
    assert FLOAT32.state_bytes == 16


def test_copies_for_checkpoints_count_for_what_a_device_owns():
    def parts(model):
        return stage_parts(
            params=100, owned_params=25, kept_per_micro_batch=0, working_bytes=0,
            micro_batches_kept=0, model=model, framework_bytes=0,
        )  # fmt: skip

    model = replace(FLOAT32, saved_bytes=SAVED_BYTES)
    assert parts(model).copies == 25 * 12
    assert parts(model).total == parts(FLOAT32).total + 25 * 12
    assert parts(replace(model, trainable_share=0.1)).copies == pytest.approx(25 * 1.2)
    assert model.state_bytes == 16 + 12


def test_earlier_stages_keep_more_micro_batches_under_1f1b():
    assert [in_flight("1f1b", s, 4, 8) for s in range(4)] == [4, 3, 2, 1]
    assert [in_flight("1f1b", s, 4, 2) for s in range(4)] == [2, 2, 2, 1]
    assert in_flight("gpipe", 3, 4, 8) == 8


def test_an_interleaved_stage_keeps_more_than_a_plain_one():
    plain = in_flight("1f1b", 0, 4, 64)
    assert plain < in_flight("interleaved", 0, 4, 64, chunks=2) < 2 * plain


def test_recomputation_keeps_less():
    none, selective, full = (kept_bytes(BLOCK, 10, 1, r) for r in ("none", "selective", "full"))
    assert (none, selective, full) == (1000.0, 340.0, 20.0)


def test_selective_recomputation_leaves_out_the_core_where_it_is_known():
    """Fused attention keeps next to nothing: then there is next to nothing to win."""
    fused = replace(BLOCK, core_bytes=4.0)
    assert kept_bytes(fused, 10, 1, "selective") == 960.0
    assert kept_bytes(fused, 10, 2, "selective", 700.0) == 680.0
    assert kept_bytes(fused, 10, 1, "full") == 20.0
    assert anew_bytes(fused, 10, 1, "selective") == 40.0
    assert anew_bytes(fused, 10, 1, "full") == 1000.0
    assert anew_bytes(fused, 10, 1, "full", 600.0) == 600.0


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("kind", ["embedding", "head"])
def test_only_blocks_are_computed_again(kind, recompute):
    """A head hands on nothing, so its logits were once taken as free under recomputation."""
    end = replace(BLOCK, kind=kind, output_bytes=0.0)
    assert kept_bytes(end, 10, 1, recompute) == 1000.0
    assert anew_bytes(end, 10, 1, recompute) == 0.0


def test_a_measured_activation_goes_before_the_shape():
    assert kept_bytes(BLOCK, 10, 2, "none", 77.0) == 77.0


def test_korthikanti_22b_keeps_what_the_paper_says_of_selective_recomputation():
    """2205.05198, figure 7: with sequence parallelism, selective keeps 16.18 / 66.84 of plain."""
    hidden, heads, seq = 6144, 64, 2048
    block = LayerShape(
        kind="block",
        params=1,
        forward_flop=1.0,
        activation_bytes=34.0 * hidden + 5.0 * heads * seq,
        output_bytes=2.0 * hidden,
    )
    share = kept_bytes(block, 1, 8, "selective") / kept_bytes(block, 1, 8, "none")
    assert share == pytest.approx(16.18 / 66.84, rel=0.01)


def test_sharing_the_optimizer_out_leaves_weights_and_gradients():
    def taken(shards):
        return stage_parts(
            params=10,
            kept_per_micro_batch=5,
            working_bytes=0,
            micro_batches_kept=3,
            model=MemoryModel(),
            framework_bytes=1000,
            owned_params=10 / shards,
        ).total

    assert taken(1) == 10 * 16 + 15 + 1000
    assert taken(4) == 10 * (4 + 3) + 15 + 1000


def test_lora_trains_a_share_only():
    model = MemoryModel(trainable_share=0.01)
    assert model.state_bytes == pytest.approx(2 + 0.14)


def test_the_owner_of_most_layers_counts_where_whole_layers_are_shared_out():
    """Layers 1 to 4 of 5 parameters each: of two owners one has layers 2 and 4, the other 1 and 3;
    of three, one has 1 and 4. A tied matrix is updated by each.
    """
    column = [0, 7, 12, 17, 22, 27, 34]  # prefix sums
    assert largest_share(column, [(1, 5)], 1, is_tied=False) == 20
    assert largest_share(column, [(1, 5)], 2, is_tied=False) == 10
    assert largest_share(column, [(1, 5)], 3, is_tied=False) == 10  # 20 / 3 evenly
    assert largest_share(column, [(1, 5)], 64, is_tied=False) == 5
    assert largest_share(column, [(0, 3)], 64, is_tied=True) == 7 + 5
    assert largest_share(column, [(0, 6)], 64, is_tied=True) == 7 + 5  # one matrix, held once
