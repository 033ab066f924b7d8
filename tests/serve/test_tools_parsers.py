"""Parsers of tool calls: every family's words, in pieces of every size."""

from __future__ import annotations

import json
import random
from typing import Any

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from mxn.engine.echo import byte_tokenizer
from mxn.models.tokenizer import Tokenizer
from mxn.serve.chat.tools.formats import FORMATS, XmlFormat, tool_format
from mxn.serve.chat.tools.grammar import Signature, call_rules, free_rules
from mxn.serve.chat.tools.parser import JsonToolParser, ToolParser
from mxn.serve.chat.tools.xml import XmlToolParser

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
A = '{"city": "Kö}\\"<tool_call>ln", "days": 3}'
B = '{"city": "", "days": 0}'
CALLS = [("weather", A), ("wind", B)]

# (format, answer, text before, calls, text after)
ANSWERS: list[tuple[str, str, str, list[tuple[str, str]], str]] = [
    (
        "hermes",
        f'Hm.\n<tool_call>\n{{"name": "weather", "arguments": {A}}}\n</tool_call>\n<tool_call>\n'
        f'{{"arguments": {B}, "name": "wind"}}\n</tool_call>\nbye',
        "Hm.\n", CALLS, "\nbye",
    ),
    ("hermes", '<tool_call>{"name": "wind"}</tool_call>\n', "", [("wind", "{}")], ""),
    (
        "hermes",
        '<tool_call>{"type": "function", "function": {"name": "wind", '
        '"arguments": "{\\"days\\": 1}"}}</tool_call>',
        "", [("wind", '{"days": 1}')], "",
    ),
    ("hermes", '<tool_call>{"name": "wind", "arguments": {"a": [1', "", [("wind", '{"a": [1')], ""),
    (
        "llama3",
        f'{{"name": "weather", "parameters": {A}}}; {{"name": "wind", "parameters": {B}}}',
        "", CALLS, "",
    ),
    (
        "llama3", f'Hm.<|python_tag|>{{"name": "wind", "parameters": {B}}}',
        "Hm.", [("wind", B)], "",
    ),
    (
        "mistral",
        f'[TOOL_CALLS][{{"name": "weather", "arguments": {A}}}, '
        f'{{"name": "wind", "arguments": {B}, "id": "123456789"}}]',
        "", CALLS, "",
    ),
    (
        "mistral-args", f"[TOOL_CALLS]weather[ARGS]{A}[TOOL_CALLS]wind[CALL_ID]ab12[ARGS]{B}",
        "", CALLS, "",
    ),
    ("mistral", f"[TOOL_CALLS]weather{A}", "", [("weather", A)], ""),
    (
        "deepseek-v3",
        "Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
        f"```json\n{A}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>wind\n"
        f"```json\n{B}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Hm.", CALLS, "",
    ),
    (
        "deepseek-v3.1",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{A}<｜tool▁call▁end｜>"
        f"<｜tool▁call▁begin｜>wind<｜tool▁sep｜>{B}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "", CALLS, "",
    ),
    (
        "kimi-k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        f"<|tool_call_argument_begin|>{A}<|tool_call_end|><|tool_calls_section_end|>",
        "", [("weather", A)], "",
    ),
    (
        "granite",
        f'<|tool_call|>[{{"name": "weather", "arguments": {A}}}, '
        f'{{"name": "wind", "arguments": {B}}}]',
        "", CALLS, "",
    ),
    ("granite", f'<tool_call>[{{"name": "wind", "arguments": {B}}}]', "", [("wind", B)], ""),
    (
        "phi4", f'<|tool_call|>[{{"name": "weather", "arguments": {A}}}]<|/tool_call|>',
        "", [("weather", A)], "",
    ),
    ("phi4", f'functools[{{"name": "wind", "arguments": {B}}}]', "", [("wind", B)], ""),
    (
        "internlm",
        f'Hm.<|action_start|><|plugin|>\n{{"name": "wind", "parameters": {B}}}<|action_end|>\n',
        "Hm.", [("wind", B)], "",
    ),
    (
        "json",
        f'[{{"name": "weather", "arguments": {A}}}, {{"name": "wind", "arguments": {B}}}]',
        "", CALLS, "",
    ),
    ("json", f'\n{{"name": "wind", "arguments": {B}}} ', "", [("wind", B)], ""),
    (
        "qwen3-coder",
        "Hm.\n<tool_call>\n<function=weather>\n<parameter=city>\n3 <b>\n\n</parameter>\n"
        "<parameter=days>\n12\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n"
        "<function=wind>\n</function>\n</tool_call>",
        "Hm.\n", [("weather", '{"city": "3 <b>\\n", "days": 12}'), ("wind", "{}")], "",
    ),
    (
        "qwen3-coder", "<function=wind>\n<parameter=days>\ntwo\n</parameter>\n</function>",
        "", [("wind", '{"days": "two"}')], "",
    ),
    (
        "glm-4.5",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        "", [("weather", '{"city": "Köln", "days": 3}')], "",
    ),
]  # fmt: skip

NO_CALLS = [
    ("hermes", "a <tool_call> b"),
    ("hermes", '<tool_call>{"x": 1}</tool_call>'),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}'),
    ("hermes", '<tool_call>{"name": "wind", "argu'),
    ("hermes", "a <tool_cal"),
    ("hermes", " \n "),
    ("llama3", f'{{"name": "unknown", "parameters": {B}}}'),
    ("llama3", '{"answer": [1, {"name": "wind"}]}'),
    ("llama3", "<|python_tag|>print(1)"),
    ("llama3", 'Say {"name": "wind", "parameters": {}}'),
    ("json", "[1, 2]"),
    ("mistral", "[TOOL_CALLS] I cannot do {that}"),
    ("mistral", "[TOOL_CALLS][]"),
    ("deepseek-v3", "<｜tool▁calls▁begin｜> no"),
    ("qwen3-coder", "<tool_call>nothing</tool_call>"),
    ("qwen3-coder", "<function=a b>"),
    ("glm-4.5", "<tool_call>no call at all\n"),
]


def parser(name: str) -> ToolParser:
    form = FORMATS[name]
    if isinstance(form, XmlFormat):
        return XmlToolParser(form, {"weather": SCHEMA, "wind": {}})
    return JsonToolParser(form, {"weather", "wind"})


def parsed(name: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]], str]:
    """Return (text before the calls, calls, text after them)."""
    reader = parser(name)
    found = [item for piece in pieces for item in reader.feed(piece)] + reader.finish()
    before, after = "", ""
    calls: list[list[str]] = []
    for kind, text in found:
        if kind == "start":
            calls.append([text, ""])
        elif kind == "args":
            calls[-1][1] += text
        elif calls:
            after += text
        else:
            before += text
    return before, [(name, arguments) for name, arguments in calls], after


def cut(text: str, largest: int, seed: int) -> list[str]:
    rng, pieces, at = random.Random(seed), [], 0
    while at < len(text):
        size = rng.randint(1, largest)
        pieces.append(text[at : at + size])
        at += size
    return pieces


@pytest.mark.parametrize("case", ANSWERS, ids=lambda case: f"{case[0]}-{len(case[1])}")
@pytest.mark.parametrize("largest", [1, 2, 5, 17, 10_000])
def test_calls_are_the_same_in_pieces_of_any_size(case, largest):
    name, answer, *wanted = case
    for seed in range(8):
        assert parsed(name, cut(answer, largest, seed)) == tuple(wanted)


@pytest.mark.parametrize(("name", "answer"), NO_CALLS)
@pytest.mark.parametrize("largest", [1, 3, 10_000])
def test_what_becomes_no_call_stays_text(name, answer, largest):
    for seed in range(5):
        assert parsed(name, cut(answer, largest, seed)) == (answer, [], "")


WORDS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<function=wind>", "```",
    "<parameter=days>", "</parameter>", "</function>", '{"name": "wind", "arguments": ', "{}", "}",
    "]", "[", '"', "\\", ",", ";", " ", "\n", "wind", "é", "<", "1", '{"name": "wind"', ": ",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    words=st.lists(st.sampled_from(WORDS), max_size=25),
    seed=st.integers(0, 99),
)
def test_any_text_gives_the_same_in_pieces_and_never_fails(name, words, seed):
    answer = "".join(words)
    whole = parsed(name, [answer] if answer else [])
    assert parsed(name, cut(answer, 1, 0)) == whole
    assert parsed(name, cut(answer, 9, seed)) == whole
    if not whole[1]:
        assert whole[0] == answer, "without a call nothing may be lost"


def test_arguments_come_out_while_they_are_written():
    reader = parser("hermes")
    assert reader.feed('<tool_call>{"name": "wind", "arguments": {"a"') == [
        ("start", "wind"), ("args", '{"a"'),
    ]  # fmt: skip
    assert reader.feed(": 1") == [("args", ": 1")]


# The grammar of a family must write what the parser of the family reads.

SPECIAL = sorted({mark for form in FORMATS.values() for mark in form.markers() if "\n" not in mark})
SIGNATURES = [
    Signature(name="weather", schema=SCHEMA),
    Signature(name="wind", schema={"type": "object", "properties": {}}),
]


@pytest.fixture(scope="module", params=["letters", "tokens", "special tokens"])
def tokenizer(request) -> Tokenizer:
    """Marks as letters, as tokens of their own, and as special ones."""
    made = byte_tokenizer()
    if request.param == "letters":
        return made
    assert made.raw is not None
    is_special = request.param == "special tokens"
    added = [AddedToken(mark, special=is_special, normalized=False) for mark in SPECIAL]
    made.raw.add_tokens(added)
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    return Tokenizer.from_tokenizers(made.raw, config=config)


def accepts(tokenizer: Tokenizer, rules: list[str], text: str) -> bool:
    assert tokenizer.raw is not None
    native = llguidance.LLTokenizer(tokenizer.raw.to_str())
    grammar = llguidance.LLMatcher.grammar_from_lark("\n".join(rules))
    assert not llguidance.LLMatcher.validate_grammar(grammar, native)
    matcher = llguidance.LLMatcher(native, grammar)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def written(name: str, arguments: dict[str, Any]) -> str:
    """Return two calls as the grammar of a family writes them."""
    form = FORMATS[name]
    if isinstance(form, XmlFormat):
        pad = form.line if form.head else ""
        items = "".join(
            f"{form.key}{key}{form.value}{pad}{value}{pad}{form.value_end}\n"
            for key, value in arguments.items()
        )
        tail = form.head_end if form.head_end == "\n" else form.head_end + "\n"
        foot = form.foot + "\n" if form.foot else ""
        lead = form.opens[0] + pad + form.head
        return (
            f"{lead}weather{tail}{items}{foot}{form.closes[0]}\n"
            f"{lead}wind{tail}{foot}{form.closes[0]}"
        )
    join = "".join
    calls = [
        join(form.before)
        + "weather"
        + join(form.middle)
        + json.dumps(arguments)
        + join(form.after),
        join(form.before) + "wind" + join(form.middle) + "{}" + join(form.after),
    ]
    return join(form.begin) + join(form.between).join(calls) + join(form.end)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_grammar_writes_what_the_parser_reads(name, tokenizer):
    good = {"city": "Rome", "days": 3}
    answer = written(name, good)
    _, calls, _ = parsed(name, [answer])
    assert [(call, json.loads(arguments)) for call, arguments in calls] == [
        ("weather", good), ("wind", {}),
    ]  # fmt: skip
    added = tokenizer.added_id
    many = ["start: calls", *call_rules(FORMATS[name], SIGNATURES, added, is_single=False)]
    one = ["start: calls", *call_rules(FORMATS[name], SIGNATURES, added, is_single=True)]
    assert accepts(tokenizer, many, answer)
    assert not accepts(tokenizer, one, answer), "at most one call"
    assert not accepts(tokenizer, many, "Hello"), "a call must come"
    assert not accepts(tokenizer, many, written(name, {"city": "Rome", "days": "x"}))
    assert not accepts(tokenizer, many, written(name, {"city": "Rome"})), "days is required"
    assert not accepts(tokenizer, many, answer.replace("weather", "storm"))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_free_grammar_lets_text_pass_and_holds_calls_to_their_schema(name, tokenizer):
    form = FORMATS[name]
    free = ["start: free", *free_rules(form, SIGNATURES, tokenizer.added_id, is_single=False)]
    good = written(name, {"city": "Rome", "days": 3})
    assert accepts(tokenizer, free, "Hello, {x} [1] <b> wind.\n\nBye")
    assert accepts(tokenizer, free, "")
    assert accepts(tokenizer, free, good)
    assert not accepts(tokenizer, free, written(name, {"city": "Rome", "days": "x"}))
    if form.opens and not getattr(form, "is_bare", False):
        assert accepts(tokenizer, free, "Let me see.\n" + good)
        assert not accepts(tokenizer, free, "Hm " + written(name, {"city": "Rome"}))


TEMPLATES = [
    ("{{ messages }}", "", "hermes"),
    ("{% if tools %}<tool_call>\n</tool_call>{% endif %}", "", "hermes"),
    ("tools <tool_call><function=x>", "", "qwen3-coder"),
    ("tools <tool_call>{k}<arg_key>", "", "glm-4.5"),
    ("tools [TOOL_CALLS] x", "", "mistral"),
    ("tools [TOOL_CALLS]x[ARGS]", "", "mistral-args"),
    ("tools <｜tool▁call▁begin｜>function\n```json", "", "deepseek-v3"),
    ("tools <｜tool▁call▁begin｜>", "", "deepseek-v3.1"),
    ("tools <|python_tag|>", "", "llama3"),
    ("tools <|tool_call|>", "", "granite"),
    ("tools <|tool_call|><|/tool_call|>", "", "phi4"),
    ("tools", "llama", "llama3"),
    ("tools", "unknown", "json"),
]


@pytest.mark.parametrize(("template", "family", "wanted"), TEMPLATES)
def test_template_decides_the_format(template, family, wanted):
    assert tool_format(None, template.__contains__, family).name == wanted
    assert tool_format("json", template.__contains__, family).name == "json"
