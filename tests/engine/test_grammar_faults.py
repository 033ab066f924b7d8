"""Grammars that break, cost too much or do not fit: only the request that brought one ends."""

from __future__ import annotations

import json
import threading
import time

import pytest

from mxn.engine import grammar as grammars
from mxn.engine.config import EngineConfig
from mxn.engine.grammar import CODE, FAILED_CODE, Grammars, masks
from mxn.engine.local import LocalEngine
from mxn.engine.protocol import (
    MAX_GRAMMAR_CHARS,
    Cancel,
    Delta,
    Failed,
    Generate,
    Grammar,
    SamplingParams,
)
from mxn.errors import UserError
from mxn.models.catalogue import shipped_dir
from mxn.models.tokenizer import Tokenizer
from mxn.serve.chat import lark

PROMPT = [5, 9, 40, 41, 42, 17, 80, 33]
LEAD = "/[a-z ]{40}/"  # more tokens than are tried at the start
AMBIGUOUS = Grammar(kind="lark", source='start: a\na: a a a | "x" a "x" | "x" | " x"')


def wide(num_properties):
    names = {f"p{number}": {"type": "string"} for number in range(num_properties)}
    return json.dumps({"type": "object", "properties": names})


# Each passes the check without a tokenizer, and fails at its first or second token.
EMPTY = [
    Grammar(kind="regex", source=r"[^\s\S]"),
    Grammar(kind="lark", source='start: "a" b\nb: b "c"'),
    Grammar(kind="json_schema", source=wide(600)),
]
# These fail later: in the mask, and with a token that the mask allowed.
LATE = [
    Grammar(kind="lark", source=f'start: {LEAD} "a" b\nb: b "c"'),
    Grammar(kind="lark", source=f"start: {LEAD} obj\nobj: %json {wide(600)}"),
]
WAYS = [
    SamplingParams(temperature=0, max_tokens=80),
    SamplingParams(temperature=1.0, seed=3, max_tokens=80),
    SamplingParams(temperature=1.0, seed=3, top_p=0.9, max_tokens=80, logprobs=1),
]


@pytest.fixture(scope="module")
def core():
    folder = shipped_dir() / "mxn-shakespeare-llama"
    core = LocalEngine.load(EngineConfig(model=str(folder), device="cpu:0", threads=1)).core
    yield core
    core._grammars.close()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(shipped_dir() / "mxn-shakespeare-llama")


@pytest.fixture
def made(tokenizer):
    made = Grammars(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id])
    yield made
    made.close()


def asked(name, grammar=None, sampling=WAYS[0], **options):
    fields = {key: getattr(sampling, key) for key in sampling.__struct_fields__}
    params = SamplingParams(**(fields | {"grammar": grammar}))
    return Generate(request_id=name, prompt_ids=PROMPT, sampling=params, **options)


def run(core, *messages):
    """Return the deltas and failures of each request, by its id."""
    found = {message.request_id: [] for message in messages}
    replies = [reply for message in messages for reply in core.handle(message)]
    while True:
        for reply in replies:
            found[reply.request_id].append(reply)
        if not core.has_work:
            core.validate()
            return found
        replies = core.step()


def tokens(replies):
    assert all(isinstance(reply, Delta) for reply in replies), replies
    return [token for reply in replies for token in reply.token_ids]


@pytest.mark.parametrize("grammar", EMPTY)
def test_what_fails_at_once_is_refused(core, grammar):
    assert lark.fault(grammar) is None
    [failed] = run(core, asked("bad", grammar))["bad"]
    assert isinstance(failed, Failed)
    assert failed.is_user_error
    assert failed.code == CODE
    assert "<" not in failed.message.replace("<=", "")


@pytest.mark.parametrize("sampling", WAYS)
@pytest.mark.parametrize("grammar", LATE)
def test_what_fails_later_ends_one_request_only(core, grammar, sampling, monkeypatch, caplog):
    alone = tokens(run(core, asked("good", None, sampling))["good"])
    steps = []
    model = core._runner._model
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args: steps.append(1) or forward(*args))
    before = core.stats().steps_total
    found = run(core, asked("good", None, sampling), asked("bad", grammar, sampling))
    assert tokens(found["good"]) == alone
    *deltas, failed = found["bad"]
    assert len(tokens(deltas)) > 2
    assert isinstance(failed, Failed)
    assert failed.is_user_error
    assert failed.code == FAILED_CODE
    assert len(steps) == core.stats().steps_total - before  # nobody's work was done twice
    said = [record for record in caplog.records if record.name.startswith("mxn.engine")]
    assert not said  # threads that other tests left may say something too
    assert core._runner.num_sequences == 0


def test_tokens_that_do_not_follow_the_grammar_end_one_request_only(core):
    grammar = Grammar(kind="choice", source="yes\nno")
    found = run(core, asked("good"), asked("bad", grammar, resume_ids=[5, 6]))
    [failed] = found["bad"]
    assert isinstance(failed, Failed)
    assert (failed.is_user_error, failed.code) == (False, FAILED_CODE)
    assert tokens(found["good"])


def test_a_grammar_that_costs_too_much_ends(made, tokenizer, monkeypatch):
    monkeypatch.setattr(grammars, "BUDGET_S", 0.05)
    monkeypatch.setattr(grammars, "BUDGET_TOKEN_S", 0.001)
    x = tokenizer.encode("x", add_special_tokens=False)[-1]
    state = made.begin(AMBIGUOUS)
    began_s = time.thread_time()

    def follow():
        for _ in range(2000):
            masks([state], tokenizer.vocab_size)
            state.consume(x)

    with pytest.raises(UserError, match="the limit is") as caught:
        follow()
    assert caught.value.code == FAILED_CODE
    assert time.thread_time() - began_s < 2
    assert not masks([state], tokenizer.vocab_size).any()


def test_usual_grammars_are_far_within_the_budget(made, tokenizer):
    state = made.begin(Grammar(kind="json_schema", source=wide(100)))
    for token in tokenizer.encode('{"p3": "' + 200 * "word ", add_special_tokens=False):
        allowed = masks([state], tokenizer.vocab_size)[0]
        if allowed[token]:
            state.consume(token)
    assert state.problem is None
    assert state._spent_s < (grammars.BUDGET_S + grammars.BUDGET_TOKEN_S * state._num_tokens) / 2


@pytest.fixture
def gate(core, monkeypatch):
    """Holds up the compiler until it is set."""
    gate = threading.Event()
    compile_one = core._grammars._compile

    def wait_first(grammar):
        assert gate.wait(20)
        return compile_one(grammar)

    monkeypatch.setattr(core._grammars, "_compile", wait_first)
    yield gate
    gate.set()


def test_a_grammar_is_compiled_beside_the_steps(core, gate):
    grammar = Grammar(kind="regex", source="[a-f]{3}")
    assert core.handle(asked("slow", grammar)) == []
    assert [reply.code for reply in core.handle(asked("slow", grammar))] == [None]  # in use
    assert core.stats().num_waiting == 1
    assert core.handle(asked("good")) == []
    done = []
    while not any(getattr(reply, "finish_reason", None) for reply in done):
        done += core.step()
    assert {reply.request_id for reply in done} == {"good"}
    assert core.has_work
    gate.set()
    text = ""
    while core.has_work:
        text += "".join(reply.text for reply in core.step())
    assert len(text) == 3


def test_a_request_can_leave_while_its_grammar_is_compiled(core, gate):
    core.handle(asked("slow", Grammar(kind="regex", source="[a-f]{4}")))
    [delta] = core.handle(Cancel(request_id="slow"))
    assert delta.finish_reason == "cancelled"
    assert not core.has_work
    core.handle(asked("slow", Grammar(kind="regex", source="[a-f]{5}")))
    [failed] = core.abort_all("the end")
    assert failed.request_id == "slow"
    assert not core.has_work


def test_sources_have_a_limit(core):
    long = Grammar(kind="regex", source="a" * (MAX_GRAMMAR_CHARS + 1))
    assert f"limit is {MAX_GRAMMAR_CHARS}" in lark.fault(long)
    [failed] = core.handle(asked("long", long))
    assert failed.is_user_error
    assert failed.code == CODE


def test_caches_hold_no_more_than_their_limits(made, monkeypatch):
    monkeypatch.setattr(grammars, "_MAX_CACHED_CHARS", 200)
    for number in range(20):
        made.begin(Grammar(kind="choice", source=f"{number:030}"))
    assert made._compiled._num_chars == 180
    assert len(made._compiled._found) == 6


def test_a_grammar_that_the_library_never_finishes_is_given_up(made, tokenizer):
    endless = " & ".join(f"/.*w{number}.*/" for number in range(60))
    began_s = time.monotonic()
    with pytest.raises(UserError, match="takes too long to read") as caught:
        made.begin(Grammar(kind="lark", source=f"start: A\nA: {endless}"))
    assert caught.value.code == CODE
    assert time.monotonic() - began_s < 25
    assert made.begin(Grammar(kind="regex", source="[a-f]{3}")).problem is None
    # Tokens by their ids and names are known to the process that reads first.
    eos = tokenizer.eos_id
    assert made.begin(Grammar(kind="lark", source=f'start: <[1-3]> "a" <[{eos}]>')).problem is None


@pytest.mark.parametrize("kind", ["json_schema", "lark"])
def test_patterns_that_meet_hold_up_neither_server_nor_engine(made, kind):
    schema = json.dumps({"allOf": [{"type": "string", "pattern": f"w{n}"} for n in range(40)]})
    source = schema if kind == "json_schema" else f"start: a\na: %json {schema}"
    began_s = time.monotonic()
    assert lark.fault(Grammar(kind=kind, source=source)) is None
    assert time.monotonic() - began_s < 1
    with pytest.raises(UserError, match="takes too long to read"):
        made.begin(Grammar(kind=kind, source=source))
