"""Stored answers by tenant: in the database where there is one, else in bounded memory.

Blocking; call it from a thread. An answer of another project does not exist for the one who asks.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Protocol

import msgspec
from sqlalchemy import delete, insert, select, update

from mxn.ledger.database import Database
from mxn.ledger.tables_responses import responses
from mxn.serve.responses.types import InputItem, Response

_MAX_IN_MEMORY = 1000
_MAX_CHAIN = 256  # earlier answers that one conversation may refer back to


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    response: Response
    input: list[InputItem]  # of this request alone


class ResponseStore(Protocol):
    def put(self, project_id: str, stored: Stored) -> None: ...

    def replace(self, project_id: str, response: Response) -> None: ...

    def get(self, response_id: str, project_id: str) -> Stored | None: ...

    def delete(self, response_id: str, project_id: str) -> bool: ...


class MemoryStore:
    """The last thousand answers, gone with the process."""

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[str, str], Stored] = OrderedDict()

    def put(self, project_id: str, stored: Stored) -> None:
        self._rows[project_id, stored.response.id] = stored
        while len(self._rows) > _MAX_IN_MEMORY:
            self._rows.popitem(last=False)

    def replace(self, project_id: str, response: Response) -> None:
        key = (project_id, response.id)
        if key in self._rows:
            self._rows[key] = Stored(response=response, input=self._rows[key].input)

    def get(self, response_id: str, project_id: str) -> Stored | None:
        return self._rows.get((project_id, response_id))

    def delete(self, response_id: str, project_id: str) -> bool:
        return self._rows.pop((project_id, response_id), None) is not None


class SqlStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, project_id: str, stored: Stored) -> None:
        row = {
            "id": stored.response.id,
            "project_id": project_id,
            "created_us": time.time_ns() // 1000,
            "previous_id": stored.response.previous_response_id,
            "input": msgspec.json.encode(stored.input).decode(),
            "body": msgspec.json.encode(stored.response).decode(),
        }
        with self._database.begin() as connection:
            connection.execute(insert(responses).values(**row))

    def replace(self, project_id: str, response: Response) -> None:
        change = (
            update(responses)
            .where(responses.c.id == response.id, responses.c.project_id == project_id)
            .values(body=msgspec.json.encode(response).decode())
        )
        with self._database.begin() as connection:
            connection.execute(change)

    def get(self, response_id: str, project_id: str) -> Stored | None:
        query = select(responses.c.input, responses.c.body).where(
            responses.c.id == response_id, responses.c.project_id == project_id
        )
        with self._database.read() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        return Stored(
            response=msgspec.json.decode(row.body, type=Response),
            input=msgspec.json.decode(row.input, type=list[InputItem]),
        )

    def delete(self, response_id: str, project_id: str) -> bool:
        change = delete(responses).where(
            responses.c.id == response_id, responses.c.project_id == project_id
        )
        with self._database.begin() as connection:
            return connection.execute(change).rowcount == 1


def chain(store: ResponseStore, response_id: str, project_id: str) -> list[Stored] | None:
    """Return an answer and those it followed, the oldest first; None when one does not exist."""
    found: list[Stored] = []
    next_id: str | None = response_id
    while next_id is not None and len(found) < _MAX_CHAIN:
        stored = store.get(next_id, project_id)
        if stored is None:
            return None
        found.append(stored)
        next_id = stored.response.previous_response_id
    return found[::-1]
