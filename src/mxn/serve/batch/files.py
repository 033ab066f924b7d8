"""Uploaded files in the database: rows and chunks. Blocking; call it from a thread.

Every call names the project that asks: a file of another one does not exist for it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from mxn import env
from mxn.errors import CapacityError, ConfigError, OverloadedError
from mxn.ledger.database import Database
from mxn.ledger.tables_batch import CHUNK_BYTES, file_chunks, files
from mxn.ledger.types import Principal
from mxn.serve.batch.types import FileObject

_US = 1_000_000
_UPLOADING, _DELETED = "uploading", "deleted"  # what nobody sees yet, or any more
_UPLOAD_S = 3600  # an upload that is older was of a process that died
_STEP = 4  # chunks in one transaction when they are removed


class FileStore:
    def __init__(self, database: Database, *, max_project_bytes: int | None = None) -> None:
        self._database = database
        self._max_project_bytes = max_project_bytes or _quota()

    def write(
        self,
        parts: Iterable[bytes],
        *,
        owner: Principal,
        filename: str,
        purpose: str,
        expires_after_s: int | None = None,
        has_quota: bool = True,
    ) -> FileObject:
        """Store a file; it becomes visible as a whole or not at all.

        `has_quota` False: what the server itself writes, counted but never refused.
        Raises: CapacityError when the project's files have more bytes than they may.
        """
        now_us = time.time_ns() // 1000
        row: dict[str, Any] = {
            "id": f"file-{uuid.uuid4().hex}",
            "org_id": owner.org_id,
            "project_id": owner.project_id,
            "key_id": owner.key_id,
            "filename": filename,
            "purpose": purpose,
            "bytes": 0,
            "status": _UPLOADING,
            "created_us": now_us,
            "expires_us": now_us + expires_after_s * _US if expires_after_s else None,
        }
        with self._database.begin() as connection:
            connection.execute(insert(files).values(**row))
        try:
            for number, chunk in enumerate(_chunks(parts)):
                row["bytes"] += len(chunk)
                self._add(row, number, chunk, has_quota=has_quota)
            row["status"] = "processed"
            with self._database.begin() as connection:
                self._change(connection, row)
        except BaseException:
            self._remove([row["id"]])
            raise
        return self._object(row)

    def _add(self, row: dict[str, Any], number: int, chunk: bytes, *, has_quota: bool) -> None:
        """Write one chunk in a transaction of its own: every request waits for the write lock."""
        with self._database.begin() as connection:
            self._change(connection, row)
            if has_quota:
                query = select(func.coalesce(func.sum(files.c.bytes), 0))
                mine = files.c.project_id == row["project_id"]
                held = int(connection.execute(query.where(mine)).scalar_one())
                if held > self._max_project_bytes:
                    raise _over_quota(held, self._max_project_bytes)
            values = {"file_id": row["id"], "number": number, "data": chunk}
            connection.execute(insert(file_chunks).values(**values))

    @staticmethod
    def _change(connection: Connection, row: dict[str, Any]) -> None:
        change = update(files).where(files.c.id == row["id"], files.c.status == _UPLOADING)
        values = {"bytes": row["bytes"], "status": row["status"]}
        if connection.execute(change.values(**values)).rowcount != 1:
            raise OverloadedError(f"the upload of {row['id']} took longer than {_UPLOAD_S} s")

    def _remove(self, ids: Sequence[str]) -> None:
        """Remove files chunk by chunk; what a crash leaves of them is removed later."""
        for file_id in ids:
            mine, number = file_chunks.c.file_id == file_id, 0
            last = select(func.max(file_chunks.c.number)).where(mine)
            with self._database.begin() as connection:
                gone = update(files).where(files.c.id == file_id).values(status=_DELETED)
                connection.execute(gone)
                count = connection.execute(last).scalar()
            while count is not None and number <= count:
                number += _STEP
                with self._database.begin() as connection:
                    connection.execute(
                        delete(file_chunks).where(mine, file_chunks.c.number < number)
                    )
            with self._database.begin() as connection:
                connection.execute(delete(files).where(files.c.id == file_id))

    def get(self, file_id: str, project_id: str) -> FileObject | None:
        query = select(files).where(
            files.c.id == file_id,
            files.c.project_id == project_id,
            files.c.status.not_in((_UPLOADING, _DELETED)),
        )
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
        query = select(files).where(
            files.c.project_id == project_id, files.c.status.not_in((_UPLOADING, _DELETED))
        )
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
        if self.get(file_id, project_id) is None:
            return False
        self._remove([file_id])
        return True

    def delete_named(
        self, project_id: str, purpose: str, filename: str, may: Callable[[Connection], bool]
    ) -> bool:
        """Remove the files of a project with this name and purpose.

        `may` is asked in the transaction that takes them away; False: nothing was done.
        """
        named = (
            (files.c.project_id == project_id)
            & (files.c.purpose == purpose)
            & (files.c.filename == filename)
        )
        with self._database.begin() as connection:
            if not may(connection):
                return False
            found = list(connection.execute(select(files.c.id).where(named)).scalars())
            connection.execute(update(files).where(named).values(status=_DELETED))
        self._remove(found)
        return True

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
        """Remove files whose time is over and what crashes left; return how many."""
        now_us = time.time_ns() // 1000
        left = (files.c.status == _UPLOADING) & (files.c.created_us < now_us - _UPLOAD_S * _US)
        is_over = (files.c.expires_us < now_us) | left | (files.c.status == _DELETED)
        with self._database.read() as connection:
            found = list(connection.execute(select(files.c.id).where(is_over)).scalars())
        self._remove(found)
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


def _quota() -> int:
    text = env.get("MXN_PROJECT_FILE_BYTES")
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and int(text) > 0):
        raise ConfigError(f"MXN_PROJECT_FILE_BYTES must be a number of bytes, got {text[:40]!r}")
    return int(text)


def _over_quota(held: int, limit: int) -> CapacityError:
    return CapacityError(
        f"the files of this project would have {held} bytes; the limit is {limit}",
        hint="delete files that are not needed any more",
        code="file_quota_exceeded",
    )


def _is_expired(row: Row) -> bool:
    return row.expires_us is not None and row.expires_us < time.time_ns() // 1000


def _chunks(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Cut any parts into chunks of the stored size."""
    rest = bytearray()
    for part in parts:
        rest += part
        start = 0
        while len(rest) - start >= CHUNK_BYTES:
            yield bytes(rest[start : start + CHUNK_BYTES])
            start += CHUNK_BYTES
        del rest[:start]
    if rest:
        yield bytes(rest)
