"""Guessed tokens change the number of steps, never an answer: all sampling rules, real models."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from mxn.engine.config import EngineConfig
from mxn.engine.local import Completion, LocalEngine
from mxn.engine.protocol import Cancel, Generate, Grammar, SamplingParams
from mxn.models.catalogue import shipped_dir
from mxn.models.tokenizer import Tokenizer

FREE = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


def changed(**changes) -> SamplingParams:
    return msgspec.structs.replace(FREE, **changes)


class Guesser:
    """Guesses as well as it likes: it knows the answers, and spoils some of them."""

    def __init__(self, answers: dict[str, list[int]], num_tokens: int, wrong: float) -> None:
        self.answers, self.num_tokens, self.wrong = answers, num_tokens, wrong
        self.rng = random.Random(3)
        self.told: list[tuple[int, int]] = []
        self.gone: list[str] = []

    def propose(self, seq, limit: int) -> list[int]:
        known = self.answers[seq.seq_id][seq.num_output :]
        spoiled = [(t + 1) % 256 if self.rng.random() < self.wrong else t for t in known]
        return spoiled[: min(limit, self.num_tokens)]

    def observe(self, seq_id: str, num_drafted: int, num_accepted: int) -> None:
        self.told.append((num_drafted, num_accepted))

    def observe_step(self, num_sequences: int, num_drafts: int, elapsed_s: float) -> None:
        pass

    def forget(self, seq_id: str) -> None:
        self.gone.append(seq_id)


@pytest.fixture
def make(tiny_config):
    def make_engine(**settings) -> LocalEngine:
        return LocalEngine.load(tiny_config(**settings))

    return make_engine


def guessing(engine: LocalEngine, answers: list[list[int]], num_tokens=4, wrong=0.3) -> Guesser:
    """Let `engine` guess from these answers to its next prompts."""
    first = engine._num_requests + 1
    named = {f"local-{first + i}": answer for i, answer in enumerate(answers)}
    guesser = engine.core._scheduler._drafter = Guesser(named, num_tokens, wrong)
    return guesser


def note_sizes(engine: LocalEngine) -> list[tuple[int, bool]]:
    """Return a list that gets (rows, one for each sequence) of every forward pass."""
    sizes: list[tuple[int, bool]] = []
    forward = engine.core._runner._model.forward

    def noted(batch, cache):
        sizes.append((len(batch.token_ids_T), batch.attention.is_decode))
        return forward(batch, cache)

    engine.core._runner._model.forward = noted
    return sizes


def same(got: list[Completion], want: list[Completion]) -> None:
    for one, other in zip(got, want, strict=True):
        other.cached_tokens = one.cached_tokens
        assert one == other


def load_shipped(directory: Path, weights: str, speculation: str) -> LocalEngine:
    return LocalEngine.load(
        EngineConfig(
            model=str(directory), weights=weights, speculation=speculation, threads=1,
            max_sequences=4, max_batch_tokens=64, device="cpu",
            dtype="float32" if weights == "plain" else "auto",
        )
    )  # fmt: skip


RULES = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 4},
    "hot": {"temperature": 5.0, "seed": 5},
    "top_p": {"temperature": 2.0, "seed": 6, "top_p": 0.8},
    "top_k": {"temperature": 2.0, "seed": 7, "top_k": 3},
    "min_p": {"temperature": 2.0, "seed": 8, "min_p": 0.1},
    "repetition": {"repetition_penalty": 1.8},
    "frequency": {"frequency_penalty": 1.5, "temperature": 1.0, "seed": 9},
    "presence": {"presence_penalty": 1.5},
    "bias": {"logit_bias": {65: 8.0, 66: -8.0}, "temperature": 1.0, "seed": 10},
    "logprobs": {"logprobs": 3},
    "drawn logprobs": {"logprobs": 2, "temperature": 1.0, "seed": 11},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": tuple(range(128)), "seed": 12},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
}
PROMPTS = [list(b"to be or not to be, to be or not"), [7], list(range(60)), [5] * 20]


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0], ids=["all-right", "some-wrong", "all-wrong"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_every_rule_gives_the_same_answers_whether_guesses_come_true_or_not(make, rules, wrong):
    sampling = changed(**rules)
    want = make().generate(PROMPTS, sampling)
    engine = make(max_draft_rows=32)
    guesser = guessing(engine, [answer.token_ids for answer in want], wrong=wrong)
    same(engine.generate(PROMPTS, sampling), want)
    stats = engine.stats()
    assert stats.kv_pages_used == 0
    engine.core.validate()
    drafted, accepted = map(sum, zip(*guesser.told, strict=True)) if guesser.told else (0, 0)
    assert (stats.draft_tokens_total, stats.accepted_draft_tokens_total) == (drafted, accepted)
    if max(len(answer.token_ids) for answer in want) > 2:
        assert stats.drafts_total == len(guesser.told) > 0
        is_cut = any(answer.finish_reason == "stop" for answer in want)  # drafts behind the end
        assert (accepted == drafted) if wrong == 0 and not is_cut else (accepted < drafted)
        assert accepted > 0 or wrong == 1.0


def test_drafts_save_steps(make):
    want = make().generate(PROMPTS[:1], FREE)
    engine = make()
    guessing(engine, [want[0].token_ids], wrong=0)
    same(engine.generate(PROMPTS[:1], FREE), want)
    assert engine.stats().steps_total == 1 + 8  # 1 from the prompt, then 39 in fives


@pytest.mark.parametrize("kind", ["string", "token", "both"])
def test_a_stop_within_accepted_drafts_ends_the_answer_there(make, kind):
    whole = make().generate(PROMPTS, FREE)
    for at in range(3, 12):
        rules = {}
        if kind != "token":
            rules["stop"] = (whole[0].text[at : at + 2],)
        if kind != "string":
            rules["stop_token_ids"] = (whole[0].token_ids[at],)
        want = make().generate(PROMPTS, changed(**rules))
        engine = make(max_draft_rows=32)
        guessing(engine, [answer.token_ids for answer in whole], wrong=0)
        got = engine.generate(PROMPTS, changed(**rules))
        same(got, want)
        assert engine.stats().kv_pages_used == 0
        assert engine.stats().generation_tokens_total == sum(len(a.token_ids) for a in got)


def test_the_cached_pages_behind_an_answer_hold_what_was_accepted(make):
    """Go on from each answer through the prefix cache: a rejected token there would show."""
    want = make().generate(PROMPTS, FREE)
    engine = make(max_draft_rows=32)
    guessing(engine, [answer.token_ids for answer in want], wrong=0.5)
    first = engine.generate(PROMPTS, FREE)
    longer = [p + a.token_ids + [1] for p, a in zip(PROMPTS, first, strict=True)]
    engine.core._scheduler._drafter = None
    again = engine.generate(longer, FREE)
    assert all(a.cached_tokens >= len(p) - 8 for a, p in zip(again, longer, strict=True))
    fresh = make(prefix_caching=False).generate(longer, FREE)
    same(again, fresh)


def test_preemption_with_drafts_changes_no_token(make):
    want = make().generate(PROMPTS * 2, FREE)
    engine = make(max_context=128, kv_bytes=40 * 4 * 128, max_draft_rows=32)
    guessing(engine, [answer.token_ids for answer in want], wrong=0.4)
    same(engine.generate(PROMPTS * 2, FREE), want)
    assert engine.stats().preemptions_total > 0
    assert engine.stats().accepted_draft_tokens_total > 0
    assert engine.stats().kv_pages_used == 0


def test_the_end_of_the_context_cuts_drafts(make):
    endless = changed(max_tokens=None)
    want = make(max_context=48).generate([list(range(30))], endless)
    assert len(want[0].token_ids) == 18
    engine = make(max_context=48)
    guessing(engine, [want[0].token_ids + [1] * 9], wrong=0)
    same(engine.generate([list(range(30))], endless), want)


def test_cancelling_between_drafts_frees_all_pages_and_the_guesser_forgets(make):
    want = make().generate(PROMPTS[:1], FREE)
    for num_steps in range(6):
        engine = make()
        guesser = guessing(engine, [want[0].token_ids], wrong=0.5)
        guesser.answers["a"] = want[0].token_ids
        message = Generate(request_id="a", prompt_ids=PROMPTS[0], sampling=FREE)
        assert engine.core.handle(message) == []
        for _ in range(num_steps):
            engine.core.step()
        engine.core.handle(Cancel(request_id="a"))
        assert engine.stats().kv_pages_used == 0
        assert guesser.gone == ["a"]
        engine.core.validate()


def test_a_pass_that_fails_runs_again_without_its_drafts(make):
    want = make().generate(PROMPTS, FREE)
    engine = make(model="tiny?oom_over=16", max_draft_rows=32, max_batch_tokens=64)
    guessing(engine, [answer.token_ids for answer in want], wrong=0)
    same(engine.generate(PROMPTS, FREE), want)
    engine = make(model="tiny?raise_at=3")
    guessing(engine, [want[0].token_ids], wrong=0)
    same(engine.generate(PROMPTS[:1], FREE), want[:1])


def test_a_broken_token_behind_a_draft_fails_only_when_its_turn_comes(make):
    want = make().generate(PROMPTS[:1], FREE)[0]
    engine = make()
    guessing(engine, [want.token_ids], wrong=0)
    forward = engine.core._runner._model.forward

    def broken(batch, cache):
        logits_RV = forward(batch, cache)
        rows = range(len(batch.positions_T)) if batch.logits_rows_R is None else (
            batch.logits_rows_R.tolist()
        )  # fmt: skip
        for row, at in enumerate(rows):
            if batch.positions_T[at] == len(PROMPTS[0]) + 7:
                logits_RV[row] = float("nan")
        return logits_RV

    engine.core._runner._model.forward = broken
    message = Generate(request_id="local-1", prompt_ids=PROMPTS[0], sampling=FREE)
    engine.core.handle(message)
    tokens, last = [], None
    while engine.core.has_work:
        for last in engine.core.step():
            tokens += getattr(last, "token_ids", [])
    assert tokens == want.token_ids[:8]
    assert "no finite logit" in last.message
    assert engine.stats().kv_pages_used == 0


def test_many_rows_leave_no_room_for_drafts(make):
    want = make().generate(PROMPTS, FREE)
    engine = make(max_draft_rows=4, max_batch_tokens=256)
    guesser = guessing(engine, [answer.token_ids for answer in want], wrong=0)
    same(engine.generate(PROMPTS, FREE), want)
    assert guesser.told == []
    engine = make(max_draft_rows=6, max_batch_tokens=256)
    sizes = note_sizes(engine)
    guesser = guessing(engine, [answer.token_ids for answer in want], wrong=0)
    same(engine.generate(PROMPTS, FREE), want)
    rows = [rows for rows, is_decode in sizes if not is_decode]
    assert rows[0] > 6  # the prompts
    assert set(rows[1:]) == {6}  # four sequences and two guesses, or fewer and more


def test_a_grammar_runs_without_drafts_and_is_counted():
    directory = shipped_dir() / "mxn-shakespeare-llama"
    prompts = [Tokenizer.load(directory).encode("O happy dagger! O happy")] * 2
    ruled = changed(grammar=Grammar(kind="regex", source="(ab)+"), max_tokens=12)
    off, on = (load_shipped(directory, "int8", speculation) for speculation in ("off", "ngram"))
    same(on.generate(prompts, [ruled, FREE]), off.generate(prompts, [ruled, FREE]))
    assert on.stats().undrafted_requests_total == 1
    assert off.stats().undrafted_requests_total == 0
    before = on.stats().drafts_total
    assert before > 0
    on.generate(prompts, ruled)
    assert on.stats().drafts_total == before


def test_prompt_lookup_gives_the_same_answers_in_random_company(make):
    rng = random.Random(8)
    prompts = [[rng.randrange(4)] * rng.randint(1, 9) * 3 for _ in range(24)]
    rules = [
        changed(temperature=rng.choice((0.0, 0.3, 1.0)), seed=i, max_tokens=rng.randint(1, 50))
        for i in range(24)
    ]
    want = make().generate(prompts, rules)
    engine = make(speculation="ngram", max_context=128, kv_bytes=80 * 4 * 128, max_draft_rows=40)
    same(engine.generate(prompts, rules), want)
    stats = engine.stats()
    assert stats.draft_tokens_total > 0
    assert len(engine.core._scheduler._drafter) == 0
    assert stats.kv_pages_used == 0


@pytest.mark.parametrize("weights", ["plain", "int8"])
@pytest.mark.parametrize("model", ["mxn-shakespeare-llama", "mxn-shakespeare-dsv3"])
def test_shipped_models_write_the_same_text_in_fewer_steps(model, weights):
    directory = shipped_dir() / model
    tokenizer = Tokenizer.load(directory)
    lines = ("ROMEO:\nWhat light", "To be", "O happy dagger! O happy dagger! O happy")
    prompts = [tokenizer.encode(line) for line in lines]
    rules = [FREE, changed(temperature=0.8, seed=3), changed(repetition_penalty=1.1)]
    rules = [msgspec.structs.replace(rule, max_tokens=120) for rule in rules]
    engines = [load_shipped(directory, weights, how) for how in ("off", "ngram")]
    for batch in ([0], [0, 1, 2]):
        some, own = [prompts[i] for i in batch], [rules[i] for i in batch]
        want, got = (engine.generate(some, own) for engine in engines)
        assert [answer.text for answer in got] == [answer.text for answer in want]
        same(got, want)
    off, on = (engine.stats() for engine in engines)
    assert on.accepted_draft_tokens_total > 30
    assert on.steps_total < off.steps_total
    assert off.draft_tokens_total == 0
