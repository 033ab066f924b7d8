"""Uploaded files in the database: rows and chunks. Blocking; call it from a thread.

Every call names the project that asks: a file of another one does not exist for it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from sqlalchemy import Row, delete, insert, select, update

from mxn.ledger.database import Database
from mxn.ledger.tables_batch import CHUNK_BYTES, file_chunks, files
from mxn.ledger.types import Principal
from mxn.serve.batch.types import FileObject

_US = 1_000_000


class FileStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    def write(
        self,
        parts: Iterable[bytes],
        *,
        owner: Principal,
        filename: str,
        purpose: str,
        expires_after_s: int | None = None,
    ) -> FileObject:
        """Store a file; it becomes visible as a whole or not at all."""
        now_us = time.time_ns() // 1000
        row: dict[str, Any] = {
            "id": f"file-{uuid.uuid4().hex}",
            "org_id": owner.org_id,
            "project_id": owner.project_id,
            "key_id": owner.key_id,
            "filename": filename,
            "purpose": purpose,
            "bytes": 0,
            "status": "processed",
            "created_us": now_us,
            "expires_us": now_us + expires_after_s * _US if expires_after_s else None,
        }
        with self._database.begin() as connection:
            connection.execute(insert(files).values(**row))
            for number, chunk in enumerate(_chunks(parts)):
                values = {"file_id": row["id"], "number": number, "data": chunk}
                connection.execute(insert(file_chunks).values(**values))
                row["bytes"] += len(chunk)
            size = update(files).where(files.c.id == row["id"]).values(bytes=row["bytes"])
            connection.execute(size)
        return self._object(row)

    def get(self, file_id: str, project_id: str) -> FileObject | None:
        query = select(files).where(files.c.id == file_id, files.c.project_id == project_id)
        with self._database.read() as connection:
            row = connection.execute(query).first()
        if row is None or _is_expired(row):
            return None
        return self._object(row._mapping)

    def page(
        self,
        project_id: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        order: str = "desc",
    ) -> tuple[list[FileObject], bool]:
        """Return a page and whether there is more."""
        query = select(files).where(files.c.project_id == project_id)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        is_down = order != "asc"
        if after is not None:
            anchor = self.get(after, project_id)
            if anchor is None:
                return [], False
            at = select(files.c.created_us).where(files.c.id == after).scalar_subquery()
            query = query.where(files.c.created_us < at if is_down else files.c.created_us > at)
        query = query.order_by(files.c.created_us.desc() if is_down else files.c.created_us)
        with self._database.read() as connection:
            rows = connection.execute(query.limit(limit + 1)).all()
        found = [self._object(row._mapping) for row in rows if not _is_expired(row)]
        return found[:limit], len(rows) > limit

    def delete(self, file_id: str, project_id: str) -> bool:
        with self._database.begin() as connection:
            mine = delete(files).where(files.c.id == file_id, files.c.project_id == project_id)
            is_there = connection.execute(mine).rowcount == 1
            if is_there:
                connection.execute(delete(file_chunks).where(file_chunks.c.file_id == file_id))
        return is_there

    def read(self, file_id: str) -> Iterator[bytes]:
        """Yield a file's chunks in order."""
        number = 0
        while True:
            query = select(file_chunks.c.data).where(
                file_chunks.c.file_id == file_id, file_chunks.c.number == number
            )
            with self._database.read() as connection:
                data = connection.execute(query).scalar()
            if data is None:
                return
            yield data
            number += 1

    def lines(self, file_id: str, max_bytes: int) -> Iterator[bytes]:
        """Yield a file's lines without their ends.

        Of a line longer than `max_bytes` comes one byte more than that, so that its length tells.
        """
        line = bytearray()
        for chunk in self.read(file_id):
            start = 0
            while (end := chunk.find(b"\n", start)) >= 0:
                line += chunk[start : min(end, start + max_bytes + 1 - len(line))]
                yield bytes(line)
                line.clear()
                start = end + 1
            line += chunk[start : start + max_bytes + 1 - len(line)]
        if line:
            yield bytes(line)

    def delete_expired(self) -> int:
        """Remove files whose time is over; return how many."""
        now_us = time.time_ns() // 1000
        with self._database.begin() as connection:
            ids = select(files.c.id).where(files.c.expires_us < now_us)
            found = list(connection.execute(ids).scalars())
            if found:
                connection.execute(delete(file_chunks).where(file_chunks.c.file_id.in_(found)))
                connection.execute(delete(files).where(files.c.id.in_(found)))
        return len(found)

    @staticmethod
    def _object(row: Any) -> FileObject:
        expires = row["expires_us"]
        return FileObject(
            id=row["id"],
            bytes=row["bytes"],
            created_at=row["created_us"] // _US,
            expires_at=expires // _US if expires is not None else None,
            filename=row["filename"],
            purpose=row["purpose"],
            status=row["status"],
        )


def _is_expired(row: Row) -> bool:
    return row.expires_us is not None and row.expires_us < time.time_ns() // 1000


def _chunks(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Cut any parts into chunks of the stored size."""
    rest = b""
    for part in parts:
        rest += part
        while len(rest) >= CHUNK_BYTES:
            yield rest[:CHUNK_BYTES]
            rest = rest[CHUNK_BYTES:]
    if rest:
        yield rest
