"""Stored answers have limits: sizes of fields, bytes per project, length of a chain, age."""

from __future__ import annotations

import msgspec
import pytest
from sqlalchemy import update

from mxn.ledger.database import Database
from mxn.ledger.tables_responses import responses
from mxn.serve.openai.errors import ApiError
from mxn.serve.responses.store import MemoryStore, SqlStore, Stored, chain
from mxn.serve.responses.types import Response, ResponseRequest


def stored(name, *, previous=None, user=None):
    response = Response(
        id=name, created_at=0.0, status="completed", model="m",
        previous_response_id=previous, user=user,
    )  # fmt: skip
    return Stored(response=response, input=[])


@pytest.mark.parametrize(
    "given",
    [
        {"metadata": {str(i): "" for i in range(17)}},
        {"metadata": {"k" * 65: ""}},
        {"metadata": {"k": "v" * 513}},
        {"user": "u" * 513},
    ],
)
def test_fields_that_are_kept_have_a_size(given):
    with pytest.raises(msgspec.ValidationError, match="length"):
        msgspec.convert(given, ResponseRequest)


def test_a_project_pushes_out_its_own_answers_only():
    store = MemoryStore(max_rows=100, max_bytes=20_000)
    store.put("quiet", stored("one"))
    for i in range(50):
        store.put("loud", stored(str(i), user="u" * 2000))
    assert store.get("one", "quiet") is not None
    assert store.get("49", "loud") is not None
    assert store.get("0", "loud") is None
    kept = [i for i in range(50) if store.get(str(i), "loud")]
    assert 5 <= len(kept) <= 10
    assert store.delete("49", "loud")
    assert not store.delete("49", "loud")


def test_a_chain_that_is_too_long_is_refused_not_cut():
    store = MemoryStore()
    for i in range(257):
        store.put("p", stored(str(i), previous=str(i - 1) if i else None))
    assert len(chain(store, "255", "p")) == 256
    with pytest.raises(ApiError, match="256"):
        chain(store, "256", "p")


def test_an_answer_is_forgotten_after_thirty_days(tmp_path):
    database = Database.open(f"sqlite:///{tmp_path}/ledger.db")
    store = SqlStore(database)
    store.put("p", stored("old"))
    assert store.get("old", "p") is not None
    with database.begin() as connection:
        connection.execute(update(responses).values(created_us=1))
    assert store.get("old", "p") is None
    store.put("p", stored("new"))
    with database.read() as connection:
        assert [row.id for row in connection.execute(responses.select())] == ["new"]
