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
import protocol  # noqa: E402
import report  # noqa: E402
import rounding  # noqa: E402
import servers  # noqa: E402
import steal  # noqa: E402
import tables  # noqa: E402
import traffic  # noqa: E402

sys.path.remove(str(BENCH))
for _file in BENCH.glob("*.py"):
    sys.modules.pop(_file.stem, None)  # names others may want


@pytest.fixture
def shape_of(tmp_path: Path):
    def read(name: str) -> cost.Shape:
        (tmp_path / "config.json").write_text(json.dumps(models.SHAPES[name]))
        return cost.Shape.of(tmp_path)

    return read


def test_the_shapes_have_the_published_numbers_of_parameters(shape_of):
    assert shape_of("qwen3-0.6b").stored == 596_049_920
    assert shape_of("llama-3.2-1b").stored == 1_235_814_400


def test_a_token_of_a_mixture_touches_only_its_experts(shape_of):
    moe = shape_of("qwen3-moe-cut")
    one_expert = 3 * 2048 * 768
    unused = (32 - 8) * one_expert * 6 + 32768 * 2048  # and the embedding table, not tied
    assert moe.stored - moe.active == unused


def test_a_batch_of_a_mixture_reads_more_experts_but_not_all(shape_of):
    moe, dense = shape_of("qwen3-moe-cut"), shape_of("qwen3-0.6b")
    table = 32768 * 2048
    assert moe.parameters_read(1) == moe.active
    assert moe.active < moe.parameters_read(8) < moe.stored - table
    assert moe.parameters_read(1000) == pytest.approx(moe.stored - table)
    assert dense.parameters_read(8) == dense.stored


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


def test_a_thief_s_row_has_medians_of_each_round():
    contender = contenders.find("mxn:int8")
    pairs = [steal.Pair(100.0, 60.0, 0.7), steal.Pair(50.0, 25.0, 0.9), steal.Pair(80.0, 40.0, 0.8)]
    (row,) = steal.rows({contender: pairs}, cores=2, threads=2)
    assert (row["tok_per_s"], row["left"], row["thief_cores"]) == (80.0, 0.5, 0.8)
    assert row["of_share"] == pytest.approx(0.75)
    assert steal.rows({contender: []}, cores=2, threads=2) == []


def test_lengths_of_the_trace_are_scaled_to_the_context():
    made = traffic.jobs(200, context=1024, longest=4096, vocab_size=4096, seed=1)
    assert max(len(job.prompt) + job.new_tokens for job in made) <= 1024 + 2
    assert made == traffic.jobs(200, context=1024, longest=4096, vocab_size=4096, seed=1)


def test_runs_have_the_same_lengths_and_other_words():
    first, second = (traffic.jobs(20, 512, 4096, 4096, seed=1, words=n) for n in (1, 2))
    assert [(len(a.prompt), a.new_tokens) for a in first] == [
        (len(b.prompt), b.new_tokens) for b in second
    ]
    assert all(a.prompt != b.prompt for a, b in zip(first, second, strict=True))


def test_arrivals_come_at_the_rate_and_in_the_same_pattern():
    slow, fast = traffic.arrivals(50, 1.0, seed=3), traffic.arrivals(50, 4.0, seed=3)
    assert sum(slow) == pytest.approx(50.0)
    assert [gap / 4 for gap in slow] == pytest.approx(fast)


def rate(rate_per_s: float, p95_s: float) -> dict[str, float]:
    return {"rate_per_s": rate_per_s, "latency_p95_s": p95_s, "output_tok_per_s": 25 * rate_per_s}


def test_goodput_is_the_highest_rate_within_the_latency():
    rows = [rate(1.0, 1.0), rate(2.0, 2.0), rate(3.0, 9.0)]
    assert mixed_load.goodput(rows, 2.0) is rows[1]
    assert mixed_load.goodput(rows, 0.5) is None


def test_the_search_goes_on_between_what_held_and_what_did_not():
    assert mixed_load.bounds([rate(1.0, 1.0)], capacity=2.0, p95_s=2.0) == (1.0, 2.0)
    rows = [rate(1.0, 1.0), rate(1.5, 3.0)]
    assert mixed_load.bounds(rows, capacity=2.0, p95_s=2.0) == (1.0, 1.5)
    assert mixed_load.bounds(rows, capacity=2.0, p95_s=0.5) == (0.0, 1.0)


def test_the_limit_and_the_ratio_come_from_the_best_peer():
    rows = {"mxn:int8": [rate(4.0, 1.0)], "a:x": [rate(1.0, 3.0)], "b:y": [rate(2.0, 5.0)]}
    assert mixed_load.best_peer(rows) == "b:y"
    found = {name: each[0] for name, each in rows.items()}
    assert mixed_load.ratios(found) == {"mxn:int8": 2.0}
    assert mixed_load.ratios({"mxn:int8": rows["mxn:int8"][0], "b:y": None}) == {}


def test_a_shifted_row_of_logits_is_right_and_a_permuted_one_is_not():
    true = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    assert accuracy.compare(true, true + 3.0, 1e-3).is_right
    assert not accuracy.compare(true, true[:, ::-1], 0.5).is_right


def test_rounding_stays_within_half_a_step_of_each_group():
    torch = pytest.importorskip("torch")
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    found = weight.clone()
    rounding.round_rows(found, 4, 128)
    step = weight.view(6, 2, 128).abs().amax(-1, keepdim=True) / 7
    error = (found - weight).view(6, 2, 128).abs()
    assert bool((error <= 0.501 * step).all())
    assert float(error.max()) > 0.3 * float(step.min())
    assert all(len(row.unique()) <= 15 for row in found.view(12, 128))


@pytest.mark.parametrize(
    ("weights", "allowed"),
    [("f32", 1e-3), ("bf16", 0.1), ("int8/int8", 0.1), ("q8_0", 0.1), ("int4-g128", 0.6),
     ("q4_0", 0.6)],
)  # fmt: skip
def test_what_an_engine_may_err_follows_from_plain_rounding(weights, allowed):
    truth = accuracy.Truth([], None, {8: 0.05, 4: 0.4})
    assert truth.allowed(weights) == pytest.approx(allowed)
    assert accuracy.Truth([], None, {8: 0.05, 4: 0.9}).allowed("int4") == accuracy.HIGHEST


def test_the_reason_of_a_failed_converter_is_its_last_error():
    log = "loading\nTraceback\n  File x\nValueError: no such layer\n\ncleaning up\n"
    assert contenders.reason(log) == "ValueError: no such layer"
    assert contenders.reason("a\nlast line\n") == "last line"
    assert contenders.reason("") == "it said nothing"


def test_an_engine_that_does_not_answer_is_ended(tmp_path):
    script = tmp_path / "silent.py"
    script.write_text("import time\ntime.sleep(60)\n")
    peer = protocol.Peer(name="silent", python=Path(sys.executable), script=script, limit_s=0.2)
    peer.start()
    with pytest.raises(protocol.Failed, match=r"silent gave no answer to memory in 0\.2 s"):
        peer.ask("memory")
    assert not peer.is_running
    peer.stop()


def test_each_server_gets_the_same_sizes(tmp_path):
    sizes = servers.Sizes(threads=2, slots=4, context=512)
    for name in ("mxn:int4-g128/int8", "openvino:int4", "llama.cpp:q4_0"):
        words, _ = servers.command(contenders.find(name), tmp_path, tmp_path, sizes, 1234)
        assert {"2", "4", "1234"} <= set(words)
    with pytest.raises(protocol.Failed, match="transformers has no server here"):
        servers.command(contenders.find("transformers:bf16"), tmp_path, tmp_path, sizes, 1234)


def test_a_table_has_every_contender_ratios_and_what_failed():
    cell = {"p20": 1.0, "p50": 67.18, "p80": 1.0, "unit": "tok/s"}
    result = {
        "model": "m", "limits": {"median": {"read_gb_per_s": 33.714}},
        "accuracy": {
            "mxn:int8": {"rms_error": 0.0478, "gap": None},
            "vllm:bf16": {"rms_error": None, "gap": 0.0},
        },
        "rounding_error": {"8 bits": 0.038},
        "metrics": {"decode-128": {"mxn:int8": cell, "vllm:bf16": cell | {"p50": 9.0}}},
        "limit_fraction": {"decode-128": {"mxn:int8": 0.89, "vllm:bf16": 0.4}},
        "ratios": {"decode-128": {"mxn:int8": 7.464}},
        "notes": {"openvino:int8": "ValueError: no export\nmore"},
    }  # fmt: skip
    assert tables.tables({"case": "engine", "models": [result]}).splitlines() == [
        "m: 33.7 GB/s read; rounding alone errs 0.038 in 8 bits",
        "",
        "|  | decode-128 | logit error |",
        "| --- | ---: | ---: |",
        "| mxn:int8 | 67.2 (89%) | 0.048 |",
        "| vllm:bf16 | 9.00 | token best |",
        "| **mxn:int8 / best peer** | **7.46** |  |",
        "",
        "- openvino:int8: ValueError: no export",
    ]


def test_the_table_of_the_mixed_load_names_its_limit():
    document = {
        "case": "engine_mixed_load", "p95_limit_s": 5.0, "notes": {},
        "capacity": {"mxn:int8": {"capacity_per_s": 5.0}, "b:y": {"capacity_per_s": 3.0}},
        "rows": {"mxn:int8": [rate(3.5, 1.0), rate(4.0, 4.5)], "b:y": [rate(2.0, 5.0)]},
        "goodput": {"mxn:int8": rate(4.0, 4.5), "b:y": rate(2.0, 5.0)},
        "ratios": {"mxn:int8": 2.0},
    }  # fmt: skip
    lines = tables.tables(document).splitlines()
    assert "goodput /s at p95 ≤ 5.00 s" in lines[0]
    assert lines[2] == "| mxn:int8 | 5.00 | 1.00 | 4.00 | 100 | **2.00** |"
    assert lines[3] == "| b:y | 3.00 | 5.00 | 2.00 | 50.0 |  |"


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


def test_a_checkpoint_of_another_shape_is_written_again(tmp_path, monkeypatch):
    folder = models.ensure("tiny", tmp_path)
    (folder / "truth.npz").touch()
    assert (models.ensure("tiny", tmp_path) / "truth.npz").is_file()
    monkeypatch.setitem(models.SHAPES, "tiny", models.SHAPES["tiny"] | {"num_hidden_layers": 1})
    assert not (models.ensure("tiny", tmp_path) / "truth.npz").exists()
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 1


def test_only_peers_with_no_smaller_error_count_at_equal_quality():
    cells = {"mxn:int4": {"p50": 60.0}, "a:q4": {"p50": 50.0}, "b:int4": {"p50": 40.0}}
    assert report.ratios(cells, is_cost=False) == {"mxn:int4": 1.2}
    errors = {"mxn:int4": 0.4, "a:q4": 0.3, "b:int4": 0.39}
    assert report.ratios(cells, False, errors) == {"mxn:int4": 1.5}
    assert report.ratios(cells, False, {"mxn:int4": 0.4, "a:q4": 0.3, "b:int4": 0.3}) == {}


@pytest.mark.parametrize("weights", ["int4-g128", "int4-g32-sym", "int6", "int8-g64/bf16", "plain"])
def test_every_format_has_its_bits(weights):
    assert 4 < cost.bits(weights) <= 16
