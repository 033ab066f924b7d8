"""POST /v1/completions: prompt shapes, echo, log-probabilities, best_of."""

from __future__ import annotations

import math

import pytest

IDS = [97, 98, 99]  # "abc" for the byte tokenizer


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abc"]),
        (["abc", "b"], ["abc", "bbb"]),
        (IDS, ["abc"]),
        ([IDS, [98]], ["abc", "bbb"]),
    ],
)
def test_all_four_prompt_shapes(api, prompt, texts):
    body = api.complete(prompt, max_tokens=3, temperature=0).json()
    assert body["object"] == "text_completion"
    assert [choice["text"] for choice in body["choices"]] == texts
    assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))
    assert body["usage"]["completion_tokens"] == 3 * len(texts)


def test_default_is_sixteen_tokens(api):
    assert api.complete("ab").json()["usage"]["completion_tokens"] == 16


def test_choices_are_ordered_by_prompt_then_choice(api):
    body = api.complete(["ab", "xy"], n=2, seed=0, max_tokens=2).json()
    assert [choice["text"] for choice in body["choices"]] == ["ab", "ba", "xy", "yx"]
    assert body["usage"]["prompt_tokens"] == 4


def test_echo_puts_the_prompt_in_front(api):
    body = api.complete("abc", echo=True, max_tokens=2, temperature=0).json()
    assert body["choices"][0]["text"] == "abcab"
    body = api.complete(IDS, echo=True, max_tokens=2, temperature=0).json()
    assert body["choices"][0]["text"] == "abcab"


def test_loglikelihood_request_of_lm_eval(api):
    fields = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    [choice] = api.complete([IDS], **fields).json()["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c", "a"], "the generated token follows the prompt"
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    pairs = zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True)
    for value, top in pairs:
        assert value == max(top.values()), "greedy is decided by exact equality"


def test_max_tokens_zero_with_echo_scores_the_prompt_only(api):
    body = api.complete("abc", echo=True, max_tokens=0, logprobs=2).json()
    assert body["choices"][0]["text"] == "abc"
    assert body["choices"][0]["logprobs"]["tokens"] == ["a", "b", "c"]
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0


def test_logprobs_zero_gives_the_chosen_token_only(api):
    logprobs = api.complete("ab", logprobs=0, max_tokens=2).json()["choices"][0]["logprobs"]
    assert [len(top) for top in logprobs["top_logprobs"]] == [1, 1]
    assert [len(logprobs[name]) for name in ("tokens", "token_logprobs")] == [2, 2]


def test_text_offsets_count_characters_not_bytes(api):
    logprobs = api.complete("é1", echo=True, max_tokens=0, logprobs=0).json()
    assert logprobs["choices"][0]["logprobs"]["text_offset"] == [0, 1, 1]


def test_stream_with_echo_and_logprobs_joins_to_the_whole(api, events):
    fields = {"echo": True, "logprobs": 2, "max_tokens": 7, "temperature": 0}
    [whole] = api.complete("hé", **fields).json()["choices"]
    chunks = events(api.complete("hé", stream=True, **fields))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [x for choice in choices for x in choice["logprobs"][name]] == values
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]


def test_stream_usage_comes_last(api, events):
    options = {"include_usage": True}
    chunks = events(api.complete(["a", "b"], stream=True, max_tokens=2, stream_options=options))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 6
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_best_of_keeps_the_likeliest(api):
    body = api.complete("az!", n=1, best_of=3, seed=0, max_tokens=1).json()
    assert len(body["choices"]) == 1
    by_token = {}
    for token in "az!":
        scored = api.complete(token, logprobs=0, max_tokens=1).json()["choices"][0]
        by_token[token] = scored["logprobs"]["token_logprobs"][0]
    assert body["choices"][0]["text"] == max(by_token, key=by_token.get)
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 3, "what was made is what is counted"


def test_stop_reason_names_the_stop_string(api):
    choice = api.complete("hello", stop=["ll"], max_tokens=9, temperature=0).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("he", "stop")
    assert choice["stop_reason"] == "ll"
    kept = api.complete("hello", stop="ll", max_tokens=9, include_stop_str_in_output=True)
    assert kept.json()["choices"][0]["text"] == "hell"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 2000}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop_token_ids": [1 << 20]}, "stop_token_ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ],
)
def test_bad_values_are_refused_with_their_name(api, fields, param):
    response = api.complete(**{"prompt": "a"} | fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"].split("[")[0] == param


def test_negative_and_largest_seeds_stay_in_range(api):
    api.complete("abc", seed=-1, n=2, max_tokens=1)
    seeds = [request.sampling.seed for request in api.engine.seen]
    assert all(0 <= seed < 2**63 for seed in seeds[1:])


def test_infinite_logprobs_become_a_number(api):
    from mxn.engine.protocol import TokenLogprob
    from mxn.serve.openai.logprobs import CompletionLogprobsBuilder, chat_logprobs

    entry = TokenLogprob(97, -math.inf, [(98, -0.5), (97, -math.inf)])
    block = CompletionLogprobsBuilder(api.engine.tokenizer).build([97], [entry])
    assert block.token_logprobs == [-9999.0]
    assert block.top_logprobs == [{"b": -0.5, "a": -9999.0}]
    assert chat_logprobs(api.engine.tokenizer, [entry]).content[0].logprob == -9999.0
