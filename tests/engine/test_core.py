"""The loop on a real tiny model: whatever is batched, cached, preempted or cut, the tokens stay."""

from __future__ import annotations

import random

import pytest

from mxn.engine.local import LocalEngine
from mxn.engine.protocol import Cancel, Delta, Encode, Failed, Generate, SamplingParams
from mxn.errors import CapacityError, UserError

GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


@pytest.fixture
def make(tiny_config):
    def make_engine(model: str = "tiny", **settings) -> LocalEngine:
        return LocalEngine.load(tiny_config(model, **settings))

    return make_engine


def prompts(count: int, longest: int = 40, seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def assert_empty(engine: LocalEngine) -> None:
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_pages_used) == (0, 0, 0)
    assert engine.core._runner.num_sequences == 0
    engine.core.validate()


def alone(make, some: list[list[int]], sampling=GREEDY, **settings) -> list[list[int]]:
    engine = make(prefix_caching=False, **settings)
    return [engine.generate([prompt], sampling)[0].token_ids for prompt in some]


def test_a_batch_gives_each_request_the_tokens_it_gets_alone(make):
    some = prompts(12)
    engine = make()
    answers = engine.generate(some, GREEDY)
    assert [answer.token_ids for answer in answers] == alone(make, some)
    assert {answer.finish_reason for answer in answers} == {"length"}
    assert_empty(engine)


def test_the_cache_lies_on_the_device_under_test(make, engine_device):
    engine = make()
    assert str(engine.core._runner._cache[0].k.device) == engine_device
    assert engine.core.info.device == engine_device


def test_a_prompt_in_chunks_gives_the_same_tokens(make):
    some = prompts(5, longest=100)
    chunked = make(max_batch_tokens=16, max_sequences=4).generate(some, GREEDY)
    assert [answer.token_ids for answer in chunked] == alone(make, some, max_batch_tokens=256)


def test_a_prefix_from_the_cache_gives_the_same_tokens(make):
    engine = make()
    shared = list(range(50))
    first = engine.generate([[*shared, 7]], GREEDY)[0]
    second = engine.generate([[*shared, 7], [*shared, 9, 9]], GREEDY)
    assert (first.cached_tokens, [a.cached_tokens for a in second]) == (0, [48, 48])
    assert [a.token_ids for a in second] == alone(make, [[*shared, 7], [*shared, 9, 9]])
    assert engine.stats().cached_tokens_total == 96
    assert_empty(engine)


def test_preemption_changes_no_token(make):
    some = prompts(8, longest=16)
    # 20 pages of 4 tokens: two or three sequences of up to 36 tokens at a time.
    engine = make(max_context=64, kv_bytes=20 * 4 * 128)
    assert engine.core.info.kv_pages_total == 20
    answers = engine.generate(some, GREEDY)
    assert engine.stats().preemptions_total > 0
    assert [answer.token_ids for answer in answers] == alone(make, some)
    assert_empty(engine)


def submit(engine: LocalEngine, request_id: str, prompt: list[int], **sampling) -> list:
    params = SamplingParams(**({"temperature": 0, "ignore_eos": True} | sampling))
    return engine.core.handle(Generate(request_id=request_id, prompt_ids=prompt, sampling=params))


@pytest.mark.parametrize("num_steps", [0, 1, 6], ids=["waiting", "mid-prefill", "mid-decode"])
def test_cancelling_frees_pages_at_once_and_leaves_others_alone(make, num_steps):
    engine = make(max_batch_tokens=16, max_sequences=4)
    submit(engine, "a", list(range(40)), max_tokens=50)
    for _ in range(num_steps):
        engine.core.step()
    assert (engine.stats().kv_pages_used > 0) == (num_steps > 0)
    [delta] = engine.core.handle(Cancel(request_id="a"))
    assert delta.finish_reason == "cancelled"
    assert_empty(engine)
    assert engine.stats().requests_cancelled_total == 1
    assert engine.core.handle(Cancel(request_id="a")) == []
    assert engine.generate([[1, 2]], GREEDY)[0].token_ids == alone(make, [[1, 2]])[0]


def test_a_stop_string_ends_the_answer_and_stays_out_of_it(make):
    engine = make()
    whole = engine.generate([[72, 105]], GREEDY)[0]
    text = whole.text
    stop = text[5:7]
    cut = engine.generate([[72, 105]], _with(GREEDY, stop=(stop,)))[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (
        text[: text.index(stop)],
        "stop",
        stop,
    )
    kept = engine.generate([[72, 105]], _with(GREEDY, stop=(stop,), include_stop_str=True))[0]
    assert kept.text == text[: text.index(stop) + len(stop)]
    assert len(cut.token_ids) < len(whole.token_ids)
    assert_empty(engine)


def _with(params: SamplingParams, **changes) -> SamplingParams:
    import msgspec

    return msgspec.structs.replace(params, **changes)


def test_a_stop_token_ends_the_answer_and_is_named(make):
    engine = make()
    whole = engine.generate([[5, 6]], GREEDY)[0].token_ids
    stop = whole[4]
    cut = engine.generate([[5, 6]], _with(GREEDY, stop_token_ids=(stop,)))[0]
    assert cut.token_ids == whole[: whole.index(stop) + 1]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)


def test_the_end_of_text_token_stops_unless_told_otherwise(make):
    engine = make()
    eos = engine.core.info.eos_ids[0]
    forced = _with(GREEDY, logit_bias={eos: 100.0})
    ended = engine.generate([[5]], _with(forced, ignore_eos=False))[0]
    assert (ended.token_ids, ended.text) == ([eos], "")
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    ignored = engine.generate([[5]], forced)[0]
    assert (ignored.token_ids, ignored.finish_reason) == ([eos] * 20, "length")
    late = engine.generate([[5]], _with(forced, ignore_eos=False, min_tokens=3))[0]
    assert len(late.token_ids) == 4
    assert eos not in late.token_ids[:3]


def test_the_end_of_the_context_ends_the_answer(make):
    engine = make(max_context=32)
    answer = engine.generate([list(range(30))], _with(GREEDY, max_tokens=None))[0]
    assert (len(answer.token_ids), answer.finish_reason) == (2, "length")
    assert_empty(engine)


def test_seeds_make_answers_repeatable_and_different(make):
    engine = make()
    drawn = _with(GREEDY, temperature=5.0)
    seeds = [_with(drawn, seed=seed) for seed in (1, 2, 3, 1)]
    first = [a.token_ids for a in engine.generate([[1, 2, 3]] * 4, seeds)]
    again = [engine.generate([[1, 2, 3]], sampling)[0].token_ids for sampling in seeds]
    assert first == again
    assert first[0] == first[3]
    assert len({tuple(tokens) for tokens in first}) == 3


def test_logprobs_belong_to_the_tokens_and_top_agrees(make):
    answer = make().generate([[1, 2]], _with(GREEDY, logprobs=258))[0]
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    import math

    for entry in answer.logprobs:
        assert entry.top[0] == (entry.token_id, entry.logprob)  # greedy chooses the best
        assert math.isclose(sum(math.exp(p) for _, p in entry.top), 1.0, rel_tol=1e-5)


def test_prompt_logprobs_in_chunks_are_those_of_one_piece(make):
    prompt = prompts(1, longest=60, seed=5)[0] + list(range(40))
    scored = _with(GREEDY, prompt_logprobs=2, max_tokens=2)
    whole = make(max_batch_tokens=256).generate([prompt], scored)[0].prompt_logprobs
    engine = make(max_batch_tokens=16, max_sequences=4)
    engine.generate([prompt], GREEDY)  # its pages are in the cache now, and must not be used
    chunked = engine.generate([prompt], scored)[0].prompt_logprobs
    assert whole[0] is None
    plain = engine.generate([prompt], GREEDY)[0]
    assert engine.generate([prompt], scored)[0].token_ids == plain.token_ids[:2]
    assert [entry.token_id for entry in whole[1:]] == prompt[1:]
    assert chunked == whole


def test_prompt_logprobs_survive_preemption_and_the_logit_limit(make, monkeypatch):
    some = prompts(6, longest=16)
    scored = _with(GREEDY, prompt_logprobs=1)
    want = make().generate(some, scored)
    engine = make(max_context=64, kv_bytes=20 * 4 * 128)
    engine.core._runner._max_rows = 5
    got = engine.generate(some, scored)
    assert engine.stats().preemptions_total > 0
    assert [a.prompt_logprobs for a in got] == [a.prompt_logprobs for a in want]
    assert [a.token_ids for a in got] == [a.token_ids for a in want]


def test_no_tokens_at_all_still_scores_the_prompt(make):
    engine = make()
    answer = engine.generate([[1, 2, 3]], _with(GREEDY, max_tokens=0, prompt_logprobs=0))[0]
    assert (answer.token_ids, answer.text, answer.finish_reason) == ([], "", "length")
    assert [entry.token_id for entry in answer.prompt_logprobs[1:]] == [2, 3]
    assert engine.stats().generation_tokens_total == 0
    assert_empty(engine)


def test_deltas_joined_are_the_answer_and_usage_counts_up(make):
    engine = make()
    deltas = list(engine.stream([72, 101], GREEDY))
    assert "".join(delta.text for delta in deltas) == engine.generate([[72, 101]], GREEDY)[0].text
    assert [delta.completion_tokens for delta in deltas] == list(range(1, 21))
    assert {delta.prompt_tokens for delta in deltas} == {2}
    assert [delta.finish_reason for delta in deltas] == [None] * 19 + ["length"]


def test_closing_a_stream_early_frees_its_pages(make):
    engine = make()
    stream = engine.stream([72, 101], GREEDY)
    next(stream)
    assert engine.stats().num_running == 1
    stream.close()
    assert_empty(engine)


BAD = [
    ([], {}, None, "the prompt is empty"),
    ([1] * 512, {}, "context_length_exceeded", "512 tokens, the context is 512"),
    ([258], {}, None, "token id 258 is outside the vocabulary of 258"),
    ([-1], {}, None, "token id -1"),
    ([1], {"temperature": -0.5}, None, "temperature must be at least 0, got -0.5"),
    ([1], {"temperature": float("nan")}, None, "temperature"),
    ([1], {"top_p": 0.0}, None, "top_p must be in (0, 1], got 0.0"),
    ([1], {"top_k": -3}, None, "top_k"),
    ([1], {"min_p": 1.5}, None, "min_p"),
    ([1], {"repetition_penalty": 0.0}, None, "repetition_penalty"),
    ([1], {"max_tokens": -1}, None, "max_tokens must be at least 0, got -1"),
    ([1], {"max_tokens": 2, "min_tokens": 3}, None, "min_tokens 3 is more than max_tokens 2"),
    ([1], {"logit_bias": {999: 1.0}}, None, "logit_bias names token id 999"),
    ([1], {"logit_bias": {1: 500.0}}, None, "[-100, 100]"),
    ([1], {"logprobs": 259}, None, "logprobs"),
    ([1], {"stop": ("",)}, None, "stop"),
]


@pytest.mark.parametrize(("prompt", "sampling", "code", "part"), BAD)
def test_a_bad_request_is_refused_with_its_value_and_disturbs_nobody(
    make, prompt, sampling, code, part
):
    engine = make()
    submit(engine, "good", [1, 2, 3], max_tokens=5)
    engine.core.step()
    [failed] = submit(engine, "bad", prompt, **sampling)
    assert isinstance(failed, Failed)
    assert (failed.is_user_error, failed.code) == (True, code)
    assert part in failed.message
    assert run_dry(engine)["good"].finish_reason == "length"
    assert_empty(engine)


def run_dry(engine: LocalEngine) -> dict[str, Delta | Failed]:
    """Step until idle, checking every invariant; return the last reply of each request."""
    last = {}
    while engine.core.has_work:
        for reply in engine.core.step():
            last[reply.request_id] = reply
        engine.core.validate()
    return last


def test_ids_that_the_tokenizer_has_no_token_for_are_refused_not_indexed(make, monkeypatch):
    monkeypatch.setattr("mxn.engine.testing.ByteTokenizer.vocab_size", 200)  # the matrix has 258
    engine = make()
    assert engine.core.info.vocab_size == 200
    for prompt, options in (
        ([1, 230], {"prompt_logprobs": 0}),
        ([1, 2], {"logit_bias": {230: 1.0}}),
    ):
        with pytest.raises(UserError, match="token id 230"):
            engine.generate([prompt], SamplingParams(max_tokens=2, **options))
    # The end of text is a padding row here: keeping it back must not index it either.
    answer = engine.generate([[1]], SamplingParams(max_tokens=4, min_tokens=2))[0]
    assert len(answer.token_ids) == 4
    assert_empty(engine)


def test_a_request_that_leaves_no_token_is_refused(make):
    everything = tuple(range(258))
    with pytest.raises(UserError, match="min_tokens 1 leaves no token"):
        make().generate([[1]], SamplingParams(min_tokens=1, stop_token_ids=everything))


def test_a_request_id_under_way_cannot_be_used_twice(make):
    engine = make()
    submit(engine, "a", [1], max_tokens=3)
    [failed] = submit(engine, "a", [2])
    assert failed.is_user_error
    assert run_dry(engine)["a"].completion_tokens == 3


def test_a_prompt_that_the_pool_can_never_hold_is_refused(make):
    with pytest.raises(CapacityError, match="100 tokens, the context is 80"):
        make(max_context=80).generate([[1] * 100], GREEDY)


def test_a_full_queue_refuses_new_requests_and_says_so(make):
    engine = make(max_waiting=2)
    assert submit(engine, "a", [1]) + submit(engine, "b", [1]) == []
    [failed] = submit(engine, "c", [1])
    assert (failed.code, failed.is_user_error) == ("overloaded", False)


def test_a_decoder_does_not_embed(make):
    [failed] = make().core.handle(Encode(request_id="e", sequences=[[1]]))
    assert failed.is_user_error
    assert "cannot embed" in failed.message


def test_an_encoder_is_no_local_engine(tiny_config):
    with pytest.raises(UserError, match="does not generate"):
        LocalEngine.load(tiny_config("tiny-encoder"))


def test_two_hundred_random_requests_with_random_cancels_leave_nothing_behind(make):
    rng = random.Random(11)
    engine = make(max_context=64, kv_bytes=60 * 4 * 128, max_batch_tokens=32)
    todo = [f"r{i}" for i in range(200)]
    running: set[str] = set()
    ended: dict[str, str] = {}

    def note(replies) -> None:
        for reply in replies:
            assert reply.request_id not in ended, "nothing follows the end of a request"
            reason = "failed" if isinstance(reply, Failed) else reply.finish_reason
            if reason:
                ended[reply.request_id] = reason
                running.discard(reply.request_id)

    while todo or engine.core.has_work:
        for _ in range(rng.randrange(4)):
            if todo:
                running.add(todo[-1])
                prompt = [rng.randrange(8)] * rng.randint(1, 40)
                drawn = {"temperature": rng.choice((0.0, 1.0)), "ignore_eos": False}
                note(submit(engine, todo.pop(), prompt, max_tokens=rng.randint(1, 24), **drawn))
        if running and rng.random() < 0.3:
            note(engine.core.handle(Cancel(request_id=rng.choice(sorted(running)))))
        note(engine.core.step())
        engine.core.validate()
    assert len(ended) == 200
    assert set(ended.values()) <= {"stop", "length", "cancelled"}
    stats = engine.stats()
    assert stats.requests_total == 200
    assert stats.requests_cancelled_total == sum(r == "cancelled" for r in ended.values()) > 10
    assert_empty(engine)
