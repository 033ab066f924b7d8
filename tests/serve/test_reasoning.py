"""Thoughts of a model: told apart from its answer, streamed, counted token by token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.errors import ConfigError
from mxn.serve.chat.reasoning import (
    REASONING,
    ReasoningCounter,
    ReasoningSplitter,
    how_it_begins,
    reasoning_tags,
)
from mxn.serve.settings import ServeSettings
from support.scripted import ScriptedEngine, marked_tokenizer

THINK = REASONING["think"]
ANSWER = "<think>\nLet me é see.\n</think>\n\nIt is 4."
NUM_THOUGHT = len("\nLet me é see.\n".encode())


def split(begins, pieces: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter(THINK, begins)
    found = [*(splitter.feed(piece) for piece in pieces), splitter.finish()]
    return "".join(pair[0] for pair in found), "".join(pair[1] for pair in found)


CASES = [
    ("perhaps", ANSWER, "Let me é see.", "It is 4."),
    ("perhaps", "\n" + ANSWER, "Let me é see.", "It is 4."),
    ("perhaps", "Plain <think>x</think>", "", "Plain <think>x</think>"),
    ("perhaps", " \n", "", " \n"),
    ("perhaps", "<thin", "", "<thin"),
    ("perhaps", "<think>never ends\n", "never ends\n", ""),
    ("open", "\nhm\n\n</think>\n4 </think>", "hm", "4 </think>"),
    ("open", "cut </thi", "cut </thi", ""),
    ("open", "</think>\n\n4", "", "4"),
    ("never", "<think>x</think>", "", "<think>x</think>"),
]


@pytest.mark.parametrize(("begins", "answer", "thought", "text"), CASES)
def test_splitter_gives_the_same_for_pieces_of_any_size(begins, answer, thought, text):
    for size in (1, 2, 3, 7, 100):
        pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
        assert split(begins, pieces) == (thought, text)


@settings(max_examples=200, deadline=None)
@given(
    begins=st.sampled_from(["open", "perhaps"]),
    words=st.lists(
        st.sampled_from(["<think>", "</think>", "\n", " ", "a", "</", "<"]), max_size=12
    ),
    size=st.integers(1, 5),
)
def test_splitter_and_pieces_agree_on_any_text(begins, words, size):
    answer = "".join(words)
    pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
    assert split(begins, pieces) == split(begins, [answer] if answer else [])


@pytest.mark.parametrize("is_token", [True, False], ids=["tags are tokens", "tags are letters"])
@pytest.mark.parametrize("begins", ["open", "perhaps"])
def test_counter_counts_the_tokens_between_the_tags(is_token, begins):
    tokenizer = marked_tokenizer()
    text = ANSWER if begins == "perhaps" else ANSWER.removeprefix("<think>")
    ids = tokenizer.encode(text) if is_token else list(_letters(tokenizer, text))
    counter = ReasoningCounter(THINK, begins, tokenizer)
    counter.feed(ids)
    assert counter.count == NUM_THOUGHT, "each byte is a token here"
    assert counter.is_done
    one_by_one = ReasoningCounter(THINK, begins, tokenizer)
    for token_id in ids:
        one_by_one.feed([token_id])
    assert one_by_one.count == NUM_THOUGHT


def _letters(tokenizer, text):
    for char in text:
        yield from tokenizer.encode(char)


@pytest.mark.parametrize(
    ("prompt", "continues", "begins"),
    [
        ("<|assistant|>", False, "perhaps"),
        ("<|assistant|><think>\n", False, "open"),
        ("<|assistant|><think>\n\n</think>\n\n", False, "never"),
        ("<|assistant|></think>", False, "never"),
        ("<|user|>say <think> twice<|assistant|>", False, "perhaps"),
        ("<|assistant|><think>half a th", True, "open"),
        ("<|assistant|><think>x</think>half an ans", True, "never"),
    ],
)
def test_the_end_of_the_prompt_says_how_the_answer_begins(prompt, continues, begins):
    assert how_it_begins(prompt, THINK, continues=continues) == begins
    assert how_it_begins(prompt, None, continues=continues) == "never"


def test_tags_come_from_template_or_vocabulary_or_settings():
    assert reasoning_tags(None, marked_tokenizer()) == THINK
    assert reasoning_tags(None, marked_tokenizer(template="plain")) == THINK, "its vocabulary"
    assert reasoning_tags("none", marked_tokenizer()) is None
    assert reasoning_tags("mistral", marked_tokenizer()) == REASONING["mistral"]
    with pytest.raises(ConfigError, match="unknown reasoning parser 'thinker'"):
        reasoning_tags("thinker", marked_tokenizer())


@pytest.mark.parametrize("is_special", [False, True])
@pytest.mark.parametrize("size", [1, 3, 50])
def test_thought_and_answer_are_the_same_streamed_and_whole(make_api, events, is_special, size):
    tokenizer = marked_tokenizer(is_special=is_special)
    api = make_api(ScriptedEngine(ANSWER, tokenizer=tokenizer, tokens_per_delta=size))
    body = api.chat("2+2?").json()
    [choice] = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "It is 4.",
        "refusal": None,
        "reasoning_content": "Let me é see.",
        "reasoning": "Let me é see.",
    }
    assert choice["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": NUM_THOUGHT}
    options = {"stream_options": {"include_usage": True}}
    chunks = events(api.chat("2+2?", stream=True, **options))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    for field, wanted in (("content", "It is 4."), ("reasoning", "Let me é see.")):
        assert "".join(delta.get(field, "") for delta in deltas) == wanted
    assert all(delta.get("reasoning") == delta.get("reasoning_content") for delta in deltas)
    assert chunks[-1]["usage"] == body["usage"]


def test_prompt_that_opens_the_thought(make_api):
    api = make_api(ScriptedEngine("Hm.</think>4"))
    kwargs: dict[str, Any] = {"chat_template_kwargs": {"thinks": True}}
    body = api.chat("2+2?", **kwargs).json()
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "4")
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3


@pytest.mark.parametrize(
    "fields",
    [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}],
)
def test_thinking_can_be_switched_off(make_api, fields):
    api = make_api(ScriptedEngine("4"))
    body = api.chat("2+2?", **fields).json()
    prompt = api.engine.tokenizer.decode(api.engine.seen[0].prompt_ids, skip_special_tokens=False)
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert "reasoning" not in body["choices"][0]["message"]
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_a_thought_that_never_ends_is_no_answer(make_api):
    api = make_api(ScriptedEngine(ANSWER))
    [choice] = api.chat("2+2?", max_tokens=5).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning"] == "Let"


def test_reasoning_can_be_left_out_and_is_still_counted(make_api):
    api = make_api(ScriptedEngine(ANSWER))
    body = api.chat("2+2?", include_reasoning=False).json()
    assert "reasoning" not in body["choices"][0]["message"]
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == NUM_THOUGHT


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_of_earlier_turns_is_read_under_both_names(make_api, name):
    api = make_api(ScriptedEngine("ok"))
    messages = [
        {"role": "assistant", "content": "4", name: "was easy"},
        {"role": "user", "content": "sure?"},
    ]
    assert api.chat(messages=messages).status_code == 200
    prompt = api.engine.tokenizer.decode(api.engine.seen[0].prompt_ids, skip_special_tokens=False)
    assert "<think>was easy</think>4" in prompt


def test_every_choice_thinks_for_itself(make_api):
    api = make_api(ScriptedEngine("<think>a</think>one", "two", "<think>abc</think>three"))
    body = api.chat(n=3).json()
    messages = [choice["message"] for choice in body["choices"]]
    assert [message["content"] for message in messages] == ["one", "two", "three"]
    assert [message.get("reasoning") for message in messages] == ["a", None, "abc"]
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4


@pytest.mark.parametrize("size", [1, 4])
def test_every_token_has_its_logprob_once(make_api, events, size):
    engine = ScriptedEngine(ANSWER, tokens_per_delta=size)
    api = make_api(engine)
    whole = api.chat(logprobs=True).json()
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == whole["usage"]["completion_tokens"]
    chunks = events(api.chat(logprobs=True, stream=True))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in parts if part for entry in part["content"]] == content


def test_settings_name_the_parser(make_api):
    api = make_api(ScriptedEngine(ANSWER), settings=ServeSettings(reasoning_parser="none"))
    assert api.chat().json()["choices"][0]["message"]["content"] == ANSWER
