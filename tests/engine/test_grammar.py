"""Grammars on random models: whatever the weights say, the text obeys."""

from __future__ import annotations

import json
import re
import time

import pytest

from mxn.engine.config import EngineConfig
from mxn.engine.grammar import Grammars, check, masks
from mxn.engine.local import LocalEngine
from mxn.engine.protocol import Grammar, SamplingParams
from mxn.errors import UserError
from mxn.models.catalogue import shipped_dir
from mxn.models.tokenizer import Tokenizer
from support import tiny
from support.server import write_tokenizer

PROMPT = [5, 9, 40, 41, 42, 17, 80, 33]
POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "boolean"}},
         "required": ["x", "y"], "additionalProperties": False}  # fmt: skip


def is_point(value):
    return set(value) == {"x", "y"} and type(value["x"]) is int and type(value["y"]) is bool


# A schema, and what every value of it is like.
SCHEMAS = [
    (POINT, is_point),
    ({"enum": ["red", "green", 3, None]}, lambda v: v in ("red", "green", 3, None)),
    (
        {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 4},
        lambda v: 2 <= len(v) <= 4 and set(v) <= {1, 2},
    ),
    ({"anyOf": [{"const": "a"}, POINT]}, lambda v: v == "a" or is_point(v)),
    (
        {"$defs": {"p": POINT}, "type": "object", "properties": {"p": {"$ref": "#/$defs/p"}},
         "required": ["p"], "additionalProperties": False},
        lambda v: set(v) == {"p"} and is_point(v["p"]),
    ),
    ({"type": "string", "pattern": "^[a-c]{2,4}$"}, lambda v: re.fullmatch("[a-c]{2,4}", v)),
    (
        {"type": "object", "properties": {"s": {"type": "string", "maxLength": 5}},
         "required": ["s"], "additionalProperties": False},
        lambda v: len(v["s"]) <= 5,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A tiny model over the tokenizer of a shipped one, which knows every character."""
    folder = tmp_path_factory.mktemp("model")
    tiny.write("qwen3", folder)
    write_tokenizer(folder, tiny.VOCAB)
    engine = LocalEngine.load(
        EngineConfig(model=str(folder), device="cpu:0", dtype="float32", threads=1)
    )
    yield engine
    engine.core._grammars.close()


@pytest.fixture(scope="module")
def shipped():
    folder = shipped_dir() / "mxn-shakespeare-llama"
    engine = LocalEngine.load(EngineConfig(model=str(folder), device="cpu:0", threads=1))
    yield engine
    engine.core._grammars.close()


def ask(engine, *grammars, prompt=PROMPT, **options):
    params = [
        SamplingParams(**({"temperature": 1.0, "seed": 5, "max_tokens": 120} | options),
                       grammar=grammar)
        for grammar in grammars
    ]  # fmt: skip
    return engine.generate([prompt] * len(params), params)


def schema(value):
    return Grammar(kind="json_schema", source=json.dumps(value))


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
@pytest.mark.parametrize("seed", range(4))
def test_answers_follow_their_schema(shipped, number, seed):
    wanted, holds = SCHEMAS[number]
    (answer,) = ask(shipped, schema(wanted), seed=seed)
    if answer.finish_reason == "stop":
        assert holds(json.loads(answer.text)), answer.text
    else:  # white space or digits without end, until the limit
        assert answer.finish_reason == "length"


def test_a_choice_and_a_regex_end_by_themselves(shipped):
    choice = Grammar(kind="choice", source="to be\nnot to be")
    regex = Grammar(kind="regex", source=r"[0-9]{3}-[a-f]{2}")
    first, second = ask(shipped, choice, regex)
    assert first.text in ("to be", "not to be")
    assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", second.text)
    assert first.finish_reason == second.finish_reason == "stop"


def test_rows_without_a_grammar_stay_as_they_are(shipped):
    free = ask(shipped, None, temperature=0, max_tokens=16)[0]
    mixed = ask(shipped, None, schema(POINT), None, temperature=0, max_tokens=16)
    assert mixed[0].token_ids == mixed[2].token_ids == free.token_ids


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_resumed_answer_goes_on_in_its_grammar(shipped, cut):
    from engine.test_resume import InProcess, joined, run
    from mxn.engine.protocol import Generate

    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=60, grammar=schema(POINT))
    client = InProcess(shipped.core)
    asked = Generate(request_id="g", prompt_ids=PROMPT, sampling=sampling)
    ids, text, _ = joined(run(client, asked))
    resumed = Generate(request_id="g", prompt_ids=PROMPT, sampling=sampling, resume_ids=ids[:cut])
    again, all_text, _ = joined(run(client, resumed))
    assert ids[:cut] + again == ids
    assert all_text == text


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(kind="json_schema", source="{"),
        Grammar(kind="regex", source="(["),
        Grammar(kind="lark", source="start: nowhere"),
        Grammar(kind="choice", source=""),
    ],
)
def test_what_cannot_be_read_is_the_callers_fault(shipped, grammar):
    with pytest.raises(UserError):
        check(grammar)
    with pytest.raises(UserError) as caught:
        ask(shipped, grammar)
    assert caught.value.code == "invalid_grammar"


def test_log_probabilities_are_those_of_what_was_allowed(shipped):
    (answer,) = ask(shipped, Grammar(kind="choice", source="yes\nno"), logprobs=2)
    assert all(entry.logprob > -20 for entry in answer.logprobs)


def test_masks_of_the_shipped_vocabulary_are_quick():
    tokenizer = Tokenizer.load(shipped_dir() / "mxn-shakespeare-llama")
    size = tokenizer.vocab_size
    grammars = Grammars(tokenizer, size, [tokenizer.eos_id])
    state = grammars.begin(schema(POINT))
    began_s = time.perf_counter()
    for _ in range(20):
        allowed = masks([state], size)
    assert (time.perf_counter() - began_s) / 20 < 0.01
    assert 0 < allowed.sum() < size
    grammars.close()


def test_no_token_begins_twice(engine):
    """A vocabulary with ids that stand for nothing: they are never chosen."""
    (answer,) = ask(engine, Grammar(kind="regex", source="[a-f]{5}"))
    assert re.fullmatch("[a-f]{5}", answer.text)
