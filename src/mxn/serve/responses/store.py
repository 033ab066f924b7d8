"""Stored answers by tenant: in the database where there is one, else in bounded memory.

Blocking; call it from a thread. An answer of another project does not exist for the one who asks.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from typing import Protocol

import msgspec
from sqlalchemy import delete, insert, select, update

from mxn.ledger.database import Database
from mxn.ledger.tables_responses import responses
from mxn.serve.openai.errors import ApiError
from mxn.serve.responses.types import InputItem, Response

_KEPT_US = 30 * 24 * 3600 * 1_000_000  # an answer is forgotten after 30 days
UNDER_WAY = ("queued", "in_progress")
_MAX_CHAIN = 256  # earlier answers that one conversation may refer back to


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    response: Response
    input: list[InputItem]  # of this request alone


class ResponseStore(Protocol):
    def put(self, project_id: str, stored: Stored) -> None: ...

    def replace(self, project_id: str, response: Response) -> bool:
        """Write an answer that is under way anew. False: it does not exist any more, or it was made
        final by somebody else."""
        ...

    def cancel(self, response_id: str, project_id: str) -> None:
        """Make an answer that another gateway makes `cancelled`, if it is not final yet; that one
        sees it when it looks after its answers."""
        ...

    def get(self, response_id: str, project_id: str) -> Stored | None: ...

    def delete(self, response_id: str, project_id: str) -> bool: ...


class MemoryStore:
    """The last answers of each project, gone with the process.

    A project has a number and bytes of its own, so that none pushes out the answers of another.
    """

    def __init__(self, *, max_rows: int = 1000, max_bytes: int = 16 << 20) -> None:
        self._max_rows, self._max_bytes = max_rows, max_bytes
        self._lock = threading.Lock()  # calls come from threads
        self._projects: dict[str, OrderedDict[str, tuple[Stored, int]]] = {}
        self._bytes: Counter[str] = Counter()

    def put(self, project_id: str, stored: Stored) -> None:
        with self._lock:
            self._enter(project_id, stored)

    def replace(self, project_id: str, response: Response) -> bool:
        with self._lock:
            found = self._projects.get(project_id, {}).get(response.id)
            if found is None:
                return False
            self._enter(project_id, Stored(response=response, input=found[0].input))
            return response.id in self._projects.get(project_id, {})

    def cancel(self, response_id: str, project_id: str) -> None:
        """There is no other gateway that could make what is stored here."""

    def get(self, response_id: str, project_id: str) -> Stored | None:
        with self._lock:
            found = self._projects.get(project_id, {}).get(response_id)
        return found[0] if found is not None else None

    def delete(self, response_id: str, project_id: str) -> bool:
        with self._lock:
            return self._drop(project_id, response_id)

    def _enter(self, project_id: str, stored: Stored) -> None:
        self._drop(project_id, stored.response.id)
        size = len(msgspec.json.encode(stored))
        rows = self._projects.setdefault(project_id, OrderedDict())
        rows[stored.response.id] = (stored, size)
        self._bytes[project_id] += size
        while len(rows) > self._max_rows or self._bytes[project_id] > self._max_bytes:
            self._drop(project_id, next(iter(rows)))

    def _drop(self, project_id: str, response_id: str) -> bool:
        rows = self._projects.get(project_id)
        found = rows.pop(response_id, None) if rows else None
        if found is None:
            return False
        self._bytes[project_id] -= found[1]
        if not rows:
            del self._projects[project_id], self._bytes[project_id]
        return True


class SqlStore:
    """`gateway_id` owns the answers that are put here while they are under way."""

    def __init__(self, database: Database, *, gateway_id: str = "") -> None:
        self._database = database
        self._gateway_id = gateway_id

    def put(self, project_id: str, stored: Stored) -> None:
        row = {
            "id": stored.response.id,
            "project_id": project_id,
            "created_us": time.time_ns() // 1000,
            "previous_id": stored.response.previous_response_id,
            "input": msgspec.json.encode(stored.input).decode(),
            "body": msgspec.json.encode(stored.response).decode(),
            "owner": self._owner(stored.response),
        }
        with self._database.begin() as connection:
            old = (
                responses.c.project_id == project_id,
                responses.c.created_us < row["created_us"] - _KEPT_US,
            )
            connection.execute(delete(responses).where(*old))
            connection.execute(insert(responses).values(**row))

    def replace(self, project_id: str, response: Response) -> bool:
        body = msgspec.json.encode(response).decode()
        one = (responses.c.id == response.id, responses.c.project_id == project_id)
        change = (
            update(responses)
            .where(*one, responses.c.owner == self._gateway_id)
            .values(body=body, owner=self._owner(response))
        )
        with self._database.begin() as connection:
            if connection.execute(change).rowcount == 1:
                return True
            # An earlier attempt may have been written although the connection was lost then.
            written = select(responses.c.body).where(*one)
            return connection.execute(written).scalar_one_or_none() == body

    def cancel(self, response_id: str, project_id: str) -> None:
        one = (responses.c.id == response_id, responses.c.project_id == project_id)
        under_way = (*one, responses.c.owner.is_not(None), responses.c.owner != self._gateway_id)
        with self._database.begin() as connection:
            row = connection.execute(
                select(responses.c.body, responses.c.owner).where(*under_way)
            ).one_or_none()
            if row is None:
                return
            response = msgspec.json.decode(row.body, type=Response)
            response.status = "cancelled"
            body = msgspec.json.encode(response).decode()
            change = update(responses).where(*one, responses.c.owner == row.owner)
            connection.execute(change.values(body=body, owner=None))

    def _owner(self, response: Response) -> str | None:
        return self._gateway_id if response.status in UNDER_WAY else None

    def get(self, response_id: str, project_id: str) -> Stored | None:
        query = select(responses.c.input, responses.c.body).where(
            responses.c.id == response_id,
            responses.c.project_id == project_id,
            responses.c.created_us >= time.time_ns() // 1000 - _KEPT_US,
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
    """Return an answer and those it followed, the oldest first; None when one does not exist.

    Raises: ApiError when there are more than one conversation may have.
    """
    found: list[Stored] = []
    next_id: str | None = response_id
    while next_id is not None:
        if len(found) >= _MAX_CHAIN:
            raise ApiError(
                f"The conversation has more than {_MAX_CHAIN} earlier answers; "
                "send what matters of them as input.",
                param="previous_response_id",
            )
        stored = store.get(next_id, project_id)
        if stored is None:
            return None
        found.append(stored)
        next_id = stored.response.previous_response_id
    return found[::-1]
