"""What a chip can do to a step: refuse memory, raise, give nonsense. Only what must fail fails."""

from __future__ import annotations

import pytest
import torch

from mxn.engine.local import LocalEngine
from mxn.engine.protocol import Failed, Generate, SamplingParams
from mxn.errors import CapacityError, ChipError

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
PROMPTS = {"a": [1, 2, 3], "b": [4] * 30, "c": [5, 6]}


def engine_of(config) -> LocalEngine:
    return LocalEngine.load(config)


def answers(engine: LocalEngine, prompts=PROMPTS) -> dict[str, list[int] | Failed]:
    """Run `prompts` together; return the tokens or the failure of each."""
    for request_id, prompt in prompts.items():
        message = Generate(request_id=request_id, prompt_ids=prompt, sampling=GREEDY)
        assert engine.core.handle(message) == []
    tokens: dict[str, list[int] | Failed] = {request_id: [] for request_id in prompts}
    while engine.core.has_work:
        for reply in engine.core.step():
            if isinstance(reply, Failed):
                tokens[reply.request_id] = reply
            else:
                tokens[reply.request_id] += reply.token_ids
        engine.core.validate()
    assert engine.stats().kv_pages_used == 0
    assert engine.core._runner.num_sequences == 0
    return tokens


@pytest.fixture
def wanted(tiny_config):
    return answers(engine_of(tiny_config()))


@pytest.mark.parametrize("fault", ["raise_at=1", "raise_at=3", "oom_at=1", "oom_at=4"])
def test_a_fault_that_does_not_come_back_costs_nobody_anything(tiny_config, wanted, fault):
    assert answers(engine_of(tiny_config(f"tiny?{fault}"))) == wanted


def test_what_fits_in_parts_is_run_in_parts(tiny_config, wanted):
    assert answers(engine_of(tiny_config("tiny?oom_over=20"))) == wanted


def test_out_of_memory_fails_only_the_request_that_does_not_fit(tiny_config, wanted):
    engine = engine_of(tiny_config())
    model = engine.core._runner._model
    real = model.forward

    def small_device(batch, cache):
        if max(batch.attention.context_lens) > 20:
            raise torch.OutOfMemoryError("out of memory")
        return real(batch, cache)

    model.forward = small_device
    got = answers(engine)
    assert isinstance(got["b"], Failed)
    assert "ran out of memory at a context of" in got["b"].message
    assert not got["b"].is_user_error
    assert {k: v for k, v in got.items() if k != "b"} == {k: wanted[k] for k in "ac"}
    model.forward = real
    assert answers(engine) == wanted, "the engine goes on"


def test_a_prompt_whose_first_half_does_not_fit_is_failed_once(tiny_config, wanted):
    engine = engine_of(tiny_config())
    model = engine.core._runner._model
    real = model.forward

    def no_room_at_the_beginning(batch, cache):
        if batch.positions_T[0] == 0:
            raise torch.OutOfMemoryError("out of memory")
        return real(batch, cache)

    model.forward = no_room_at_the_beginning
    got = answers(engine, {"b": PROMPTS["b"]})
    assert isinstance(got["b"], Failed)
    model.forward = real
    assert answers(engine) == wanted


def test_a_request_that_breaks_a_kernel_fails_alone(tiny_config, wanted):
    engine = engine_of(tiny_config())
    model = engine.core._runner._model
    real = model.forward

    def broken_for_four(batch, cache):
        if (batch.token_ids_T == 4).any():
            raise RuntimeError("no kernel for the number four\nwith a long story")
        return real(batch, cache)

    model.forward = broken_for_four
    got = answers(engine)
    assert got["b"].message == "the model failed: RuntimeError: no kernel for the number four"
    assert {k: v for k, v in got.items() if k != "b"} == {k: wanted[k] for k in "ac"}


def test_logits_that_are_no_numbers_fail_their_request(tiny_config, wanted):
    engine = engine_of(tiny_config())
    model = engine.core._runner._model
    real = model.forward

    def poisoned(batch, cache):
        logits = real(batch, cache)
        logits[-1] = float("nan")
        return logits

    model.forward = poisoned
    got = answers(engine, {"a": PROMPTS["a"]})
    assert "no finite logit" in got["a"].message
    model.forward = real
    assert answers(engine) == wanted


def test_pages_of_a_failed_prompt_are_not_found_in_the_prefix_cache(tiny_config, wanted):
    engine = engine_of(tiny_config("tiny?raise_at=1"))
    assert isinstance(answers(engine, {"b": PROMPTS["b"]})["b"], Failed)
    assert answers(engine) == wanted
    assert engine.stats().cached_tokens_total == 0


def test_a_dead_device_ends_the_engine_instead_of_every_request(tiny_config, monkeypatch):
    engine = engine_of(tiny_config("tiny?raise_at=1"))
    message = Generate(request_id="a", prompt_ids=[1], sampling=GREEDY)
    engine.core.handle(message)

    def dead(*_args, **_options):
        raise RuntimeError("device lost")

    monkeypatch.setattr("mxn.engine.runner.torch.ones", dead)
    with pytest.raises(ChipError, match="stopped working after: injected fault"):
        engine.core.step()


def test_a_context_that_does_not_fit_is_refused_with_both_sizes(tiny_config):
    with pytest.raises(CapacityError, match=r"needs 64 KiB of cache, .* has 9.77 KiB") as caught:
        engine_of(tiny_config(max_context=512, kv_bytes=10_000))
    assert caught.value.hint == "--max-context 76 fits"


def test_without_a_wish_the_context_is_cut_to_what_fits(tiny_config, caplog):
    engine = engine_of(tiny_config(kv_bytes=10_000))
    assert engine.core.info.max_context == 76
    assert "context cut from 512 to 76 tokens" in caplog.text
