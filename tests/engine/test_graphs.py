"""Captured decode steps: the same tokens as operator by operator, whoever comes and goes.

Without a GPU a tape of operators stands for the graph (`support/tape.py`): sizes, padding and
memory are the real ones. With one, the last test captures CUDA graphs.
"""

from __future__ import annotations

import logging

import msgspec
import pytest
import torch
from tests.engine.test_lora_parity import train
from torch import Tensor

from mxn.engine import graphs
from mxn.engine.config import EngineConfig
from mxn.engine.graphs import GraphedDecoder, sizes_for, why_not
from mxn.engine.kvstore import allocate
from mxn.engine.local import LocalEngine
from mxn.engine.protocol import SamplingParams
from mxn.errors import ConfigError
from mxn.kernels import registry, triton_host
from mxn.kernels.batch import AttentionBatch
from mxn.kernels.registry import Kernel
from support import tiny
from support.tape import TapeCapture

FREE = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
PROMPTS = [[5, 6, 7, 8], [9] * 23, list(range(30, 70)), [11], [80, 3]]


def static_attention(
    q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float,
    window: int | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention that learns nothing on the host but whether each sequence has one token."""
    if not batch.is_decode:
        return registry.kernels_of("paged_attention")["torch"].fn(
            q_TNH, k_cache, v_cache, batch, scale, window, softcap
        )
    position = torch.arange(batch.page_table_SP.shape[1] * batch.page_tokens)
    pages = batch.page_table_SP[:, position // batch.page_tokens]
    slots_SL = pages * batch.page_tokens + position % batch.page_tokens
    k, v = (c.flatten(0, 1)[slots_SL].transpose(1, 2) for c in (k_cache, v_cache))
    q_SGUH = q_TNH.unflatten(1, (k_cache.shape[2], -1))
    scores = q_SGUH @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    seen = batch.context_lens_S[:, None]
    hidden = position >= seen
    if window:
        hidden = hidden | (position < seen - window)
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    return (scores.softmax(-1) @ v).flatten(1, 2)


@pytest.fixture
def static(monkeypatch):
    """Let models take the attention above."""
    known = registry.kernels_of("paged_attention")
    entry = Kernel("paged_attention", "static", static_attention, is_static=True)
    monkeypatch.setitem(registry._KERNELS, "paged_attention", known | {"static": entry})
    monkeypatch.setenv("MXN_KERNELS", "paged_attention=static")


@pytest.fixture(scope="module", params=["qwen3", "gemma2"])
def directory(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    tiny.write(request.param, directory)
    return directory


def load(directory, **settings) -> LocalEngine:
    defaults = {"page_tokens": 4, "max_batch_tokens": 16, "max_sequences": 5, "max_context": 96}
    return LocalEngine.load(
        EngineConfig(
            model=str(directory), loader="mxn.engine.testing:load_bytes", device="cpu", threads=1,
            **(defaults | settings),
        )
    )  # fmt: skip


def captured(engine: LocalEngine, sizes=(1, 2, 5), how=None) -> GraphedDecoder:
    """Let the engine's decode steps be replayed."""
    runner, config = engine.core._runner, {"page_tokens": 4, "max_context": 96}
    num_pages = runner._cache[0].k.shape[0]
    runner._cache = allocate(runner._model, num_pages=num_pages + 1, page_tokens=4)
    graphed = GraphedDecoder(
        runner._model, runner._cache, is_adapted=lambda: engine.core.adapters.is_applied, **config
    )
    assert graphed.capture(sizes, how or TapeCapture()) is None
    runner._model = graphed
    return graphed


@pytest.mark.parametrize("rules", [{}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_replayed_steps_give_the_same_tokens(static, directory, rules):
    sampling = msgspec.structs.replace(FREE, **rules)
    want = load(directory).generate(PROMPTS, sampling)
    engine = load(directory)
    graphed = captured(engine)
    got = engine.generate(PROMPTS, sampling)
    assert [a.token_ids for a in got] == [a.token_ids for a in want]
    assert graphed.num_replayed > 10
    assert graphed.num_eager == 0
    one = engine.generate(PROMPTS[2:3], sampling)  # the same memory once more, another size
    assert one[0].token_ids == load(directory).generate(PROMPTS[2:3], sampling)[0].token_ids


def test_padding_writes_to_no_page_of_a_sequence(static, directory):
    engine = load(directory)
    captured(engine, sizes=(5,))  # every step but the fullest is padded
    sizes = [prompt for prompt in PROMPTS for _ in range(2)]
    want = load(directory).generate(sizes, FREE)
    got = engine.generate(sizes, FREE)
    assert [a.token_ids for a in got] == [a.token_ids for a in want]
    engine.core.validate()


def test_a_step_larger_than_all_graphs_runs_by_operators(static, directory):
    engine = load(directory)
    graphed = captured(engine, sizes=(1, 2))
    want = load(directory).generate(PROMPTS, FREE)
    got = engine.generate(PROMPTS, FREE)
    assert [a.token_ids for a in got] == [a.token_ids for a in want]
    assert graphed.num_eager > 0


def test_rows_with_adapters_are_not_replayed(static, tmp_path):
    reference = tiny.write("qwen3", tmp_path / "base")
    train(reference, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    engines = [load(tmp_path / "base"), load(tmp_path / "base")]
    graphed = captured(engines[1])
    answers = []
    for engine in engines:
        engine.load_adapter("poems", str(tmp_path / "adapter"))
        base = engine.generate(PROMPTS[:1], FREE)
        adapted = engine.generate(PROMPTS[:1], FREE, ["poems"])
        assert base[0].token_ids != adapted[0].token_ids
        answers.append([base[0].token_ids, adapted[0].token_ids])
    assert answers[0] == answers[1]
    assert graphed.num_replayed > 0
    assert graphed.num_eager > 0


def test_a_kernel_that_reads_lengths_on_the_host_would_be_caught_by_the_tape(directory):
    """The tape is a test of the claim `is_static`: torch's attention makes no such claim."""
    engine = load(directory)
    assert engine.core._runner._model.ops.why_not_static(["paged_attention"]) is not None
    captured(engine)
    want = load(directory).generate(PROMPTS, FREE)
    try:
        got = [a.token_ids for a in engine.generate(PROMPTS, FREE)]
    except RuntimeError:
        return
    assert got != [a.token_ids for a in want]


@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_an_engine_on_such_a_device_is_loaded_with_graphs(
    static, directory, monkeypatch, speculation
):
    want = load(directory).generate(PROMPTS, FREE)
    monkeypatch.setattr("mxn.engine.load._wants_graphs", lambda config, device: True)
    monkeypatch.setattr(graphs, "why_not", lambda _: None)
    monkeypatch.setattr(graphs, "CudaCapture", lambda _: TapeCapture())
    engine = load(directory, speculation=speculation)
    assert [a.token_ids for a in engine.generate(PROMPTS, FREE)] == [a.token_ids for a in want]
    assert engine.core._runner._model.num_replayed > 0  # with drafts there are other steps too
    assert engine.core.info.kernels["graphs"] == "decode steps of up to 5 sequences are replayed"
    pages = engine.core.info.kv_pages_total
    assert engine.core._runner._cache[0].k.shape[0] == pages + 1, "one page is nobody's"


def test_only_gpus_and_engines_that_want_it_get_graphs():
    from mxn.engine.load import _wants_graphs

    cuda, config = torch.device("cuda"), EngineConfig(model="m")
    assert _wants_graphs(config, cuda)
    assert not _wants_graphs(config, torch.device("cpu"))
    assert not _wants_graphs(EngineConfig(model="m", cuda_graphs=False), cuda)
    assert not _wants_graphs(EngineConfig(model="m", speculation="mtp"), cuda)


class Refusing:
    """A device that cannot record the second graph."""

    def __init__(self) -> None:
        self.tape = TapeCapture()

    def record(self, run):
        if self.tape.num_recorded:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return self.tape.record(run)


def test_what_cannot_be_captured_runs_without_and_says_so(static, directory, monkeypatch, caplog):
    engine = load(directory)
    runner = engine.core._runner
    monkeypatch.setattr(graphs, "why_not", lambda _: None)
    monkeypatch.setattr(graphs, "CudaCapture", lambda _: Refusing())
    with caplog.at_level(logging.WARNING, "mxn.engine"):
        model, note = graphs.capture_decode(
            runner._model, runner._cache, 4, page_tokens=4, max_context=96
        )
    assert model is runner._model
    assert note == "off: operation not permitted when stream is capturing"
    assert "decode runs operator by operator: operation not permitted" in caplog.text


def test_sizes_are_few_and_reach_the_most():
    assert sizes_for(1) == (1,)
    assert sizes_for(2) == (1, 2)
    assert sizes_for(5) == (1, 2, 4, 5)
    assert sizes_for(64) == (1, 2, 4, 8, 16, 32, 64)
    assert sizes_for(100) == (1, 2, 4, 8, 16, 32, 64, 100)
    assert sizes_for(10**6)[-1] == graphs.MAX_SEQUENCES


def test_reasons_against_a_capture_are_named(directory, monkeypatch):
    model = load(directory).core._runner._model
    assert why_not(object()) == "a object is not captured"
    assert why_not(model) == "cpu devices have no graphs here"
    monkeypatch.setattr(model, "device", torch.device("cuda"))
    assert why_not(model).endswith(" learns lengths on the host")
    assert why_not(model).startswith("paged_attention=torch")


def test_the_switch_takes_on_and_off_only(monkeypatch):
    from mxn import env

    for text, want in (("on", True), ("off", False)):
        monkeypatch.setenv("MXN_CUDA_GRAPHS", text)
        assert env.get_switch("MXN_CUDA_GRAPHS") is want
    monkeypatch.setenv("MXN_CUDA_GRAPHS", "perhaps")
    with pytest.raises(ConfigError, match="must be on or off, got 'perhaps'"):
        env.get_switch("MXN_CUDA_GRAPHS")


@pytest.mark.gpu
@pytest.mark.skipif(triton_host.missing("bfloat16") is not None, reason="no GPU with Triton")
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_cuda_graphs_give_the_logits_of_operators(family, tmp_path, monkeypatch):
    from mxn.chips import find_device
    from mxn.models.load import load_model
    from support.paged import Session

    ops = ("paged_attention", "mla_attention", "moe")
    monkeypatch.setattr(
        "mxn.kernels.tune.Table.off_reason", lambda *_: None
    )  # what the parity test on this chip is for
    monkeypatch.setenv("MXN_KERNELS", ",".join(f"{op}=triton" for op in ops))
    tiny.write(family, tmp_path)
    model = load_model(tmp_path, find_device("cuda"), "bfloat16").model
    eager, replayed = Session(model, page_tokens=16), Session(model, page_tokens=16)
    graphed, note = graphs.capture_decode(model, replayed.cache, 4, page_tokens=16, max_context=512)
    assert isinstance(graphed, GraphedDecoder), note
    replayed.model, replayed._free = graphed, [p for p in replayed._free if p != 63]
    eager._free = list(replayed._free)
    for new in ({0: [5, 6, 7], 1: [9] * 40, 2: [3]}, {0: [1], 1: [2], 2: [4]}, {1: [8], 2: [7]}):
        want, got = eager.step(new), replayed.step(new)
        for seq in new:
            error = (got[seq] - want[seq]).norm() / want[seq].norm()
            assert error < 0.02, (seq, float(error))
    assert graphed.num_replayed == 2
