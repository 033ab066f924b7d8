"""What a request pays for is what left: pieces of a stream, or a whole answer."""

from __future__ import annotations

import time

import httpx
import pytest

from mxn.engine.echo import EchoEngine
from mxn.ledger import schema
from mxn.ledger.database import Database
from support.gateways import gateway
from support.ledgers import row_of

BODY = {"model": "echo", "max_tokens": 200, "ignore_eos": True}
CHAT = BODY | {"messages": [{"role": "user", "content": "one two three four five six " * 30}]}


def last_row(served):
    from sqlalchemy import select

    with served.tenant.database.read() as connection:
        query = select(schema.usage).order_by(schema.usage.c.opened_us.desc())
        return connection.execute(query).first()


def settled_row(served):
    until_s = time.monotonic() + 5
    while (row := last_row(served)) is None or row.state != "settled":
        assert time.monotonic() < until_s, "the row stays open"
        time.sleep(0.02)
    return row


@pytest.fixture
def served(tmp_path):
    engines = [EchoEngine(token_s=0.02), EchoEngine(token_s=0.02)]
    with gateway(tmp_path, engines) as found:
        found.tenant.database = Database.open(f"sqlite:///{tmp_path}/ledger.db")
        yield found
        found.tenant.database.close()


def test_an_answer_in_one_piece_that_nobody_gets_costs_nothing(served):
    headers = {"authorization": f"Bearer {served.tenant.key}"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/chat/completions", json=CHAT, headers=headers, timeout=0.7)
    row = settled_row(served)
    assert (row.reason, row.output_tokens, row.cost_micro) == ("client_gone", 0, 0)


def test_a_row_under_way_says_only_what_has_left(served):
    headers = {"authorization": f"Bearer {served.tenant.key}"}
    with httpx.Client(headers=headers, timeout=10) as client:
        url = f"{served.url}/v1/chat/completions"
        with client.stream("POST", url, json=CHAT | {"stream": True}) as answer:
            lines = answer.iter_lines()
            while next(lines) == "" or time.sleep(0.01) is None:
                row = last_row(served)
                if row is not None and row.output_tokens:
                    break
        assert row.state == "open"
    row = settled_row(served)
    assert row.reason == "client_gone"
    assert 0 < row.output_tokens < 200
    assert row.cost_micro == row.input_tokens + 2 * row.output_tokens


def test_a_timeout_of_a_whole_answer_costs_nothing_and_a_whole_answer_all(served):
    answer = served.post("/v1/chat/completions", CHAT, headers={"x-request-timeout": "0.3"})
    assert answer.status_code == 408
    row = settled_row(served)
    assert (row.reason, row.output_tokens, row.cost_micro) == ("timeout", 0, 0)
    answer = served.post("/v1/chat/completions", CHAT | {"max_tokens": 5, "n": 2})
    usage = answer.json()["usage"]
    row = row_of(served.tenant.database, answer.json()["id"])
    assert (row.reason, row.output_tokens) == ("complete", usage["completion_tokens"])
    assert row.input_tokens == usage["prompt_tokens"]
    assert row.cost_micro == row.input_tokens + 2 * row.output_tokens
