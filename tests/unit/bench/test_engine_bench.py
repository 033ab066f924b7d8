"""The arithmetic of bench/engine: what a step costs, who is best, what a thief leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[3] / "bench" / "engine"
sys.path.insert(0, str(BENCH))

import accuracy  # noqa: E402
import contenders  # noqa: E402
import cost  # noqa: E402
import mixed_load  # noqa: E402
import models  # noqa: E402
import report  # noqa: E402
import steal  # noqa: E402

sys.path.remove(str(BENCH))
for _name in (
    "accuracy",
    "contenders",
    "cost",
    "mixed_load",
    "models",
    "report",
    "steal",
    "protocol",
    "setup_peers",
):
    sys.modules.pop(_name, None)  # names others may want


@pytest.fixture
def shape_of(tmp_path: Path):
    def read(name: str) -> cost.Shape:
        (tmp_path / "config.json").write_text(json.dumps(models.SHAPES[name]))
        return cost.Shape.read(tmp_path)

    return read


def test_the_shapes_have_the_published_numbers_of_parameters(shape_of):
    assert shape_of("qwen3-0.6b").stored == 596_049_920
    assert shape_of("llama-3.2-1b").stored == 1_235_814_400


def test_a_token_of_a_mixture_touches_only_its_experts(shape_of):
    moe = shape_of("qwen3-moe-cut")
    one_expert = 3 * 2048 * 768
    unused = (32 - 8) * one_expert * 6 + 32768 * 2048  # and the embedding table, not tied
    assert moe.stored - moe.active == unused


def test_the_cache_of_mla_is_its_latent(shape_of):
    assert shape_of("deepseek-v2-lite-cut").kv_values() == (512 + 64) * 4


def test_a_step_reads_the_weights_once_and_each_cache(shape_of):
    shape = shape_of("qwen3-0.6b")
    one = cost.bytes_per_step(shape, 1e9, 2, context=128, batch=1)
    eight = cost.bytes_per_step(shape, 1e9, 2, context=128, batch=8)
    assert one == 1e9 + 128 * 2 * 8 * 128 * 28 * 2
    assert eight - one == 7 * (one - 1e9)


@pytest.mark.parametrize(
    ("weights", "bits"), [("int4-g128", 4.25), ("int4", 4.5), ("int4-g32-sym", 4.5), ("int8", 8)]
)
def test_scales_count_as_bits(weights, bits):
    assert cost.bits(weights) == bits


def test_a_ratio_above_one_is_better_in_costs_too():
    cells = {"mxn:int8": {"p50": 2.0}, "a:x": {"p50": 4.0}, "b:y": {"p50": 8.0}}
    assert report.ratios(cells, is_cost=False) == {"mxn:int8": 0.25}
    assert report.ratios(cells, is_cost=True) == {"mxn:int8": 2.0}


@pytest.mark.parametrize(("cores", "threads", "share"), [(2, 2, 2 / 3), (2, 1, 1.0), (4, 4, 0.8)])
def test_a_fair_scheduler_leaves_each_thread_its_part(cores, threads, share):
    assert steal.fair_share(cores, threads) == pytest.approx(share)


def test_lengths_of_the_trace_are_scaled_to_the_context():
    made = mixed_load.jobs(200, context=1024, longest=4096, vocab_size=4096, seed=1)
    assert max(len(job.prompt) + job.new_tokens for job in made) <= 1024 + 2
    assert made == mixed_load.jobs(200, context=1024, longest=4096, vocab_size=4096, seed=1)


def test_goodput_is_the_most_output_within_the_latency():
    rows = [
        {"latency_p95_s": 1.0, "output_tok_per_s": 10.0},
        {"latency_p95_s": 2.0, "output_tok_per_s": 20.0},
        {"latency_p95_s": 9.0, "output_tok_per_s": 25.0},
    ]
    assert mixed_load.goodput(rows, 2.0) is rows[1]
    assert mixed_load.goodput(rows, 0.5) is None


def test_a_shifted_row_of_logits_is_right_and_a_permuted_one_is_not():
    true = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    assert accuracy.compare(true, true + 3.0, 1e-3).is_right
    assert not accuracy.compare(true, true[:, ::-1], 0.5).is_right


def test_an_unknown_contender_is_refused_with_the_choices():
    with pytest.raises(SystemExit, match=r"no contender 'llama\.cpp:q9'.*llama\.cpp:q4_0"):
        contenders.find("llama.cpp:q9")
    assert contenders.find("mxn:int4-g128/int8").kv_bytes == 1


def test_a_checkpoint_is_the_same_each_time_and_its_tokenizer_reads_any_text(tmp_path):
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    first, second = models.ensure("tiny", tmp_path / "a"), models.ensure("tiny", tmp_path / "b")
    file = "model-00001-of-00001.safetensors"
    assert (first / file).read_bytes() == (second / file).read_bytes()
    assert set(load_file(first / file)) == {
        name for name, _ in models.tensors(models.SHAPES["tiny"])
    }
    tokenizer = Tokenizer.from_file(str(first / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == models.SHAPES["tiny"]["vocab_size"]
    text = "Grüße, 世界 \n\t!"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
