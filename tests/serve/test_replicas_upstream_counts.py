"""What an answer of a foreign server costs: no count that cannot be true becomes money."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from mxn.ledger.types import CloseReason
from mxn.serve.context import RequestContext
from mxn.serve.replicas.counting import MAX_COUNT, Counter, Told, measure, told_of
from mxn.serve.replicas.sse import UpstreamUsage
from mxn.serve.replicas.upstream import Upstream, UpstreamConfig, UpstreamSet
from mxn.serve.replicas.upstream_plan import Account, Plan
from mxn.serve.replicas.upstream_run import UpstreamRun
from support.foreign import WORDS, ask, billed, chunk, fakes, gateway, lost_after, sse, whole

CHAT = "/v1/chat/completions"
END = b"data: [DONE]\n\n"


def usage(prompt: Any = 5, completion: Any = 4, cached: Any = None, thought: Any = None) -> Any:
    return UpstreamUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        prompt_tokens_details={"cached_tokens": cached},
        completion_tokens_details={"reasoning_tokens": thought},
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (usage(5, 4, 2, 1), Told(5, 2, 4, 1)),
        (usage(0, 0), Told(0, 0, 0, 0)),
        (usage(MAX_COUNT, MAX_COUNT), Told(MAX_COUNT, 0, MAX_COUNT, 0)),
        (usage(5, None), Told(5, 0, None, 0)),
        (usage(5, -1), Told(5, 0, None, 0)),
        (usage(5, 10**23), Told(5, 0, None, 0)),
        (usage(5, MAX_COUNT + 1), Told(5, 0, None, 0)),
        (usage(5, 4, thought=5), Told(5, 0, None, 0)),
        (usage(5, 4, thought=-1), Told(5, 0, None, 0)),
        (usage(-5, 4), Told(None, 0, 4, 0)),
        (usage(10**23, 4), Told(None, 0, 4, 0)),
        (usage(5, 4, cached=6), Told(None, 0, 4, 0)),
        (usage(5, 4, cached=-1), Told(None, 0, 4, 0)),
        (usage("5", 4.0), Told()),
        (usage(True, [4]), Told()),
        (UpstreamUsage(prompt_tokens_details=[1]), Told()),
    ],
    ids=str,
)
def test_only_counts_that_can_be_true_are_taken(given: UpstreamUsage, told: Told) -> None:
    assert told_of(given) == told


def test_an_answer_without_output_need_not_count_it() -> None:
    assert told_of(usage(5, None), makes_tokens=False) == Told(5, 0, 0, 0)


def test_a_broken_answer_counts_at_least_its_events_and_a_whole_one_what_was_told() -> None:
    counter = Counter(input_estimate=9, num_events=50)
    assert counter.counts(is_complete=False).output == 50
    counter.hear(usage(5, 3))
    assert counter.counts(is_complete=False).output == 50
    assert counter.counts(is_complete=True).output == 3
    counter.hear(usage(5, 60))
    assert (counter.counts(is_complete=False).output, counter.counts(is_complete=False).basis) == (
        60,
        "server",
    )
    counter.hear(usage(5, 0))
    assert counter.counts(is_complete=True).output == 50, "words, and a count of none"


BAD_COUNTS = [-5000, 10**23, 2**31, None, "4", 4.5, 0]


@pytest.mark.parametrize("bad", BAD_COUNTS, ids=str)
@pytest.mark.parametrize("stream", [True, False])
def test_an_impossible_count_is_replaced_by_ours(tmp_path: Path, bad: Any, stream: bool) -> None:
    told = {"prompt_tokens": 5, "completion_tokens": bad}
    events = [chunk({"content": word}) for word in WORDS] + [chunk({}, "stop")]
    events += [chunk(None, usage=told), END]
    body = {"choices": [{"message": {"content": "word" * 4}}], "usage": told}
    answer = sse(b"".join(events)) if stream else whole(json.dumps(body).encode())
    with fakes(lambda _: [answer]) as [fake], billed(tmp_path, fake) as gate:
        options = {"stream_options": {"include_usage": True}} if stream else {}
        said = gate.chat(stream=stream, **options)
        row = gate.row()
    assert said.status_code == 200
    assert (row.input_tokens, row.output_tokens, row.basis) == (5, 4, "events")
    assert row.cost_micro == 9
    last = said.text.strip().split("\n\n")[-2][6:] if stream else said.text
    assert json.loads(last)["usage"]["completion_tokens"] == 4, "the client sees what it pays"


@pytest.mark.parametrize("bad", [{"cached_tokens": -(10**6)}, {"cached_tokens": 6}, [1]], ids=str)
def test_cached_tokens_are_a_part_of_the_input(tmp_path: Path, bad: Any) -> None:
    told = {"prompt_tokens": 5, "completion_tokens": 4, "prompt_tokens_details": bad}
    body = {"choices": [{"message": {"content": "word" * 4}}], "usage": told}
    with (
        fakes(lambda _: [whole(json.dumps(body).encode())]) as [fake],
        billed(tmp_path, fake) as gate,
    ):
        assert gate.chat().status_code == 200
        row = gate.row()
    assert 0 <= row.cached_tokens <= row.input_tokens
    assert row.output_tokens == 4
    assert row.cost_micro == row.input_tokens + row.output_tokens


def test_thoughts_and_tool_calls_without_counts_are_estimated(tmp_path: Path) -> None:
    message = {
        "content": None,
        "reasoning_content": "x" * 400,
        "tool_calls": [{"id": "c", "function": {"name": "f" * 40, "arguments": "a" * 80}}],
    }
    body = json.dumps({"choices": [{"message": message}]}).encode()
    with fakes(lambda _: [whole(body)]) as [fake], billed(tmp_path, fake) as gate:
        gate.chat()
        assert (gate.row().output_tokens, gate.row().basis) == (100 + 10 + 20, "events")


def test_a_client_that_leaves_pays_its_events_whatever_was_told(tmp_path: Path) -> None:
    told = {"prompt_tokens": 5, "completion_tokens": 0}
    body = b"".join(chunk({"content": "x"}, usage=told) for _ in range(50))
    with fakes(lambda _: [sse(body), 5.0]) as [fake], billed(tmp_path, fake) as gate:
        asked = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        with gate.client.stream("POST", CHAT, json=asked) as answer:
            received = b""
            for piece in answer.iter_bytes():
                received += piece
                if received.count(b"data:") == 50:
                    break
        row = gate.row()
    assert (row.reason, row.input_tokens, row.output_tokens) == ("client_gone", 5, 50)


def test_the_counts_of_a_lost_server_are_not_counted_twice(tmp_path: Path) -> None:
    told = [
        chunk({"content": "x"}, usage={"prompt_tokens": 10, "completion_tokens": at + 1})
        for at in range(50)
    ]
    rest = sse(chunk({"content": "y"}) + chunk({}, "stop") + END)
    with (
        fakes(lost_after(*told), lambda _: [rest]) as found,
        billed(tmp_path, *found) as gate,
    ):
        assert gate.chat(stream=True, max_tokens=100).status_code == 200
        row = gate.row()
    assert (row.input_tokens, row.output_tokens, row.num_replicas) == (10, 51, 2)
    assert found[1].bodies[0]["max_tokens"] == 50


def test_a_stream_lost_after_its_end_still_tells_its_usage(events) -> None:
    words = [chunk({"content": word}) for word in WORDS]
    for wants in (True, False):
        with (
            fakes(lost_after(*words, chunk({}, "stop"))) as [fake],
            gateway(fake) as (client, book),
        ):
            got = events(ask(client, stream=True, stream_options={"include_usage": wants}))
            tellers = [item for item in got if item.get("usage")]
            assert [item["usage"]["completion_tokens"] for item in tellers] == [4] * wants
            assert all(item["choices"] == [] for item in tellers)
        assert book.only().output_tokens == 4


def test_usage_of_a_whole_stream_comes_once(events) -> None:
    """Also where a server counts in every event and ends without an event of its own for it."""
    told = {"prompt_tokens": 5, "completion_tokens": 4}
    body = sse(b"".join(chunk({"content": w}) for w in WORDS) + chunk({}, "stop", usage=told) + END)
    with fakes(lambda _: [body]) as [fake], gateway(fake) as (client, _):
        got = events(ask(client, stream=True, stream_options={"include_usage": True}))
    assert [item["usage"]["completion_tokens"] for item in got if item.get("usage")] == [4]


ERROR = whole(b'{"error": {"message": "boom", "code": 500}}')


def test_an_error_with_status_200_is_no_answer(tmp_path: Path) -> None:
    with fakes(lambda _: [ERROR]) as [fake], billed(tmp_path, fake) as gate:
        answer = gate.chat()
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "bad_upstream")
        assert "boom" in answer.json()["error"]["message"]
        row = gate.row()
    assert (row.reason, row.cost_micro, row.output_tokens) == ("error", 0, 0)


@pytest.mark.parametrize("bad", [ERROR, whole(b"<html>"), whole(b"[1]")])
def test_another_server_answers_instead(tmp_path: Path, bad: bytes) -> None:
    good = whole(b'{"choices": [{"message": {"content": "abcd"}}]}')
    with fakes(lambda _: [bad], lambda _: [good]) as found, billed(tmp_path, *found) as gate:
        assert gate.chat().json()["choices"][0]["message"]["content"] == "abcd"
        row = gate.row()
    assert (row.reason, row.output_tokens) == ("complete", 1)


LIMITS = ("max_tokens", "max_completion_tokens", "n_predict", "max_new_tokens")


@pytest.mark.parametrize("name", [*LIMITS, "max_output_tokens", "n", "best_of", "n_cmpl"])
@pytest.mark.parametrize("value", [-1, -(10**9), 2**31, 10**23])
def test_fields_that_say_what_is_spent_have_bounds(tmp_path: Path, name: str, value: int) -> None:
    with fakes(lambda _: []) as [fake], gateway(fake) as (client, book):
        answer = ask(client, **{name: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    assert not fake.bodies
    assert not book.opened


@pytest.mark.parametrize("name", ["n", "best_of"])
@pytest.mark.parametrize(("value", "status"), [(0, 400), (1, 200), (128, 200), (129, 400)])
def test_choices_are_between_1_and_128(name: str, value: int, status: int) -> None:
    with fakes(lambda _: [whole(b"{}")]) as [fake], gateway(fake) as (client, _):
        assert ask(client, **{name: value}).status_code == status


def plan_of(path: str, body: dict[str, Any]) -> Plan:
    data = json.dumps({"model": "m"} | body).encode()
    return Plan.read(data, id="c-1", model="m", path=path, context=RequestContext())


@pytest.mark.parametrize(
    ("path", "body", "most"),
    [
        (CHAT, {"messages": []}, 4096),
        (CHAT, {"messages": [], "max_tokens": 7}, 7),
        (CHAT, {"messages": [], "max_tokens": 0}, 4096),
        (CHAT, {"messages": [], "max_tokens": 100_000, "max_completion_tokens": 1}, 100_000),
        (CHAT, {"messages": [], "max_tokens": 1, "max_completion_tokens": 100_000}, 100_000),
        (CHAT, {"messages": [], "n_predict": 100_000, "max_tokens": 1}, 100_000),
        (CHAT, {"messages": [], "n_cmpl": 3, "max_tokens": 10}, 30),
        (CHAT, {"messages": [], "prompt": ["x"] * 9, "n": 2, "max_tokens": 10}, 20),
        ("/v1/completions", {"prompt": ["x"] * 500, "max_tokens": 1000}, 500_000),
        ("/v1/completions", {"prompt": "x", "max_tokens": 10, "best_of": 20}, 200),
        ("/v1/completions", {"prompt": "x", "max_tokens": 10, "best_of": 2, "n": 3}, 30),
        ("/v1/completions", {"prompt": [[1], [2]], "max_tokens": 10, "n": 3}, 60),
        ("/v1/completions", {"prompt": [1, 2], "max_tokens": 10}, 10),
        ("/v1/completions", {"prompt": ["x"] * 9, "messages": [], "max_tokens": 10}, 90),
        ("/v1/embeddings", {"input": ["x"] * 2000}, 0),
    ],
)
def test_what_a_request_may_spend_at_most(path: str, body: dict[str, Any], most: int) -> None:
    assert plan_of(path, body).most_output(4096) == most


def test_token_ids_are_counted() -> None:
    assert plan_of("/v1/completions", {"prompt": [7] * 1000}).input_estimate == 1000
    assert plan_of("/v1/embeddings", {"input": [[70000] * 10, [1] * 5]}).input_estimate == 15
    assert measure(["word" * 3, [1, 2], 7]) == (2, 3 + 2 + 1)
    assert measure([1, 2, 3]) == (1, 3)
    assert measure([]) == (1, 0)


def test_more_answers_than_one_request_has_are_refused() -> None:
    with fakes(lambda _: []) as [fake], gateway(fake) as (client, book):
        body = {"model": "m", "prompt": ["x"] * 500, "n": 3}
        answer = client.post("/v1/completions", json=body)
    assert (answer.status_code, "1500" in answer.text) == (400, True)
    assert not book.opened


GOOD = whole(b'{"choices": [{"message": {"content": "abcd"}}]}')


def test_a_budget_limits_answers_that_nobody_limits(tmp_path: Path) -> None:
    with (
        fakes(lambda _: [GOOD]) as [fake],
        billed(tmp_path, fake, budget=1000, max_output=300) as gate,
    ):
        assert gate.chat().status_code == 200
        assert fake.bodies[-1]["max_tokens"] == 300
        assert gate.chat(max_completion_tokens=9).status_code == 200
        assert "max_tokens" not in fake.bodies[-1]
        assert gate.chat(n=4).status_code in (402, 429), "4 x 300 is above what the budget has"
    assert len(fake.bodies) == 2


def test_the_limit_of_a_budget_holds_over_all_servers(tmp_path: Path) -> None:
    words = [chunk({"content": word}) for word in WORDS]
    rest = sse(chunk({"content": "y"}) + chunk({}, "stop") + END)
    with (
        fakes(lost_after(*words), lambda _: [rest]) as found,
        billed(tmp_path, *found, budget=1000, max_output=300) as gate,
    ):
        assert gate.chat(stream=True).status_code == 200
        assert gate.row().output_tokens == 5
    assert [fake.bodies[0]["max_tokens"] for fake in found] == [300, 296]


def test_without_a_budget_no_limit_is_set(tmp_path: Path) -> None:
    with fakes(lambda _: [GOOD]) as [fake], billed(tmp_path, fake) as gate:
        assert gate.chat().status_code == 200
    assert "max_tokens" not in fake.bodies[-1]


def piece(index: int, text: str, reason: str | None = None) -> bytes:
    value = {"choices": [{"index": index, "text": text, "finish_reason": reason}]}
    return b"data: " + json.dumps({"id": "x", "model": "up"} | value).encode() + b"\n\n"


@pytest.mark.parametrize(("last", "reason"), [("stop", "complete"), (None, "replica_lost")])
def test_every_prompt_must_have_been_answered(last: str | None, reason: str) -> None:
    parts = [piece(0, "a"), piece(1, "b"), piece(0, "a", "stop"), piece(1, "b", last)]
    with fakes(lost_after(*parts)) as [fake], gateway(fake) as (client, book):
        body = {"model": "m", "prompt": ["p", "q"], "stream": True, "max_tokens": 50}
        answer = client.post("/v1/completions", json=body)
    assert ("error" in answer.text) == (reason != "complete")
    assert (book.only().reason, book.only().output_tokens) == (reason, 4)


ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/responses", {"input": "hi"}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 50}),
]


@pytest.mark.parametrize(("path", "body"), ASKED)
@pytest.mark.parametrize("stream", [True, False])
def test_what_leaves_in_one_piece_is_paid_for_as_a_whole(
    tmp_path: Path, path: str, body: dict[str, Any], stream: bool
) -> None:
    words = [chunk({"content": word}) for word in WORDS]
    with fakes(lost_after(*words)) as [fake], billed(tmp_path, fake) as gate:
        gate.post(path, stream=stream, **body)
        row = gate.row()
    assert (row.reason, row.endpoint, row.is_stream) == ("replica_lost", path, stream)
    assert row.output_tokens == (4 if stream else 0)
    assert bool(row.cost_micro) == stream


@pytest.mark.parametrize("reason", ["client_gone", "replica_lost", "timeout", "error", "complete"])
@pytest.mark.parametrize("is_batch", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_tokens_that_never_left_are_not_settled(
    reason: CloseReason, is_batch: bool, stream: bool
) -> None:
    context = RequestContext(is_batch=is_batch)
    body = json.dumps({"messages": [], "stream": stream}).encode()
    plan = Plan.read(body, id="c-1", model="m", path=CHAT, context=context)
    servers = UpstreamSet([Upstream(UpstreamConfig(url="http://127.0.0.1:9", model="up"))])
    run = UpstreamRun(plan, servers, Account(None))
    run.counter.num_events = 7
    asyncio.run(run.settle(reason))
    is_due = reason == "complete" or (stream and not is_batch)
    assert context.output_tokens == (7 if is_due else 0)


def test_a_background_response_that_is_cancelled_costs_nothing(tmp_path: Path) -> None:
    words = sse(b"".join(chunk({"content": word}) for word in WORDS))
    with fakes(lambda _: [words, 5.0]) as [fake], billed(tmp_path, fake) as gate:
        made = gate.post("/v1/responses", input="hi", background=True).json()
        for _ in range(100):
            if fake.bodies:
                break
            threading.Event().wait(0.02)
        gate.client.post(f"/v1/responses/{made['id']}/cancel")
        row = gate.row()
    assert (row.reason, row.output_tokens, row.cost_micro) == ("client_gone", 0, 0)


@pytest.mark.parametrize(("path", "body"), ASKED)
@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_of_the_ledger_keeps_its_status(
    tmp_path: Path, path: str, body: dict[str, Any], stream: bool
) -> None:
    with fakes(lambda _: []) as [fake], billed(tmp_path, fake, budget=3) as gate:
        expected = gate.chat(max_tokens=50).status_code
        assert expected in (402, 429)
        assert gate.post(path, stream=stream, **body).status_code == expected
        assert not gate.rows()
    assert not fake.bodies


def test_a_run_whose_events_are_never_read_leaves_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("disk")

    with fakes(lambda _: []) as [fake], billed(tmp_path, fake) as gate:
        monkeypatch.setattr("mxn.serve.responses.store.SqlStore.put", fail)
        answer = gate.post("/v1/responses", input="hi", background=True)
        assert answer.status_code == 500
        threading.Event().wait(0.05)
        assert not gate.rows()
