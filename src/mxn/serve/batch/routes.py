"""/v1/files and /v1/batches: what clients see. Needs a database; without one every call says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from mxn.ledger.types import Principal
from mxn.serve.batch.files import FileStore
from mxn.serve.batch.store import BatchStore
from mxn.serve.batch.types import (
    ENDPOINTS,
    Batch,
    BatchList,
    BatchRequest,
    FileDeleted,
    FileList,
    FileObject,
)
from mxn.serve.batch.validate import MAX_FILE_BYTES
from mxn.serve.batch.worker import BatchWorker
from mxn.serve.context import current
from mxn.serve.http import json_response, parse, too_large
from mxn.serve.openai.errors import ApiError
from mxn.serve.openapi import Operation
from mxn.serve.state import State

MAX_UPLOAD_BYTES = 512 << 20
_FORM_BYTES = 1 << 20  # the form's other fields
_PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
NOBODY = Principal(key_id="", org_id="", project_id="")  # who asks where no keys are asked for


def requester() -> Principal:
    """Return who asks; every file and batch belongs to a project."""
    return current().principal or NOBODY


def not_found(kind: str, given: str) -> ApiError:
    return ApiError(f"No such {kind}: {given!r}.", status=404, param="id", code="not_found")


class FileRoutes:
    def __init__(self, state: State, files: FileStore | None) -> None:
        self._state = state
        self._store = files

    @property
    def _files(self) -> FileStore:
        if self._store is None:
            raise no_database("Files")
        return self._store

    async def create(self, request: Request) -> Response:
        files = self._files
        announced = request.headers.get("content-length", "")
        if (_number(announced) or 0) > MAX_UPLOAD_BYTES + _FORM_BYTES:
            raise too_large(MAX_UPLOAD_BYTES)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ApiError("A file is sent as multipart/form-data with 'file' and 'purpose'.")
        try:
            parser = MultiPartParser(
                request.headers, _limited(request.stream()), max_files=1, max_fields=16
            )
            form = await parser.parse()
        except (MultiPartException, KeyError, UnicodeDecodeError) as exc:
            what = exc.message if isinstance(exc, MultiPartException) else str(exc)
            raise ApiError(f"The form cannot be read: {what}") from None
        try:
            return await self._store_form(files, form)
        finally:
            await form.close()

    async def _store_form(self, files: FileStore, form: Any) -> Response:
        upload, purpose = form.get("file"), form.get("purpose")
        if not isinstance(upload, UploadFile):
            raise ApiError("file is required.", param="file")
        if purpose not in _PURPOSES:
            raise ApiError(
                f"purpose is one of {', '.join(_PURPOSES)}; got {str(purpose)[:40]!r}.",
                param="purpose",
            )
        if purpose == "batch" and (upload.size or 0) > MAX_FILE_BYTES:
            raise too_large(MAX_FILE_BYTES)
        stored = await asyncio.to_thread(
            files.write,
            _parts(upload.file),
            owner=requester(),
            filename=without_nul(upload.filename, "filename") or "file",
            purpose=purpose,
            expires_after_s=_expires_s(form),
        )
        return json_response(stored)

    async def page(self, request: Request) -> Response:
        limit = page_limit(request, 10_000, largest=10_000)
        query = request.query_params
        found, has_more = await asyncio.to_thread(
            self._files.page,
            requester().project_id,
            purpose=without_nul(query.get("purpose"), "purpose"),
            after=without_nul(query.get("after"), "after"),
            limit=limit,
            order=query.get("order", "desc"),
        )
        ids = [file.id for file in found]
        return json_response(
            FileList(
                data=found,
                first_id=ids[0] if ids else None,
                last_id=ids[-1] if ids else None,
                has_more=has_more,
            )
        )

    async def retrieve(self, request: Request) -> Response:
        return json_response(await self._find(request))

    async def delete(self, request: Request) -> Response:
        file_id = path_id(request, "file_id", "file")
        project = requester().project_id
        if not await asyncio.to_thread(self._files.delete, file_id, project):
            raise not_found("file", file_id)
        return json_response(FileDeleted(id=file_id))

    async def content(self, request: Request) -> Response:
        file = await self._find(request)
        return StreamingResponse(
            self._files.read(file.id),
            media_type="application/octet-stream",
            headers={"content-length": str(file.bytes)},
        )

    async def _find(self, request: Request) -> FileObject:
        file_id = path_id(request, "file_id", "file")
        found = await asyncio.to_thread(self._files.get, file_id, requester().project_id)
        if found is None:
            raise not_found("file", file_id)
        return found


class BatchRoutes:
    def __init__(
        self,
        state: State,
        files: FileStore | None,
        batches: BatchStore | None,
        worker: BatchWorker | None,
    ) -> None:
        self._state = state
        self._files = files
        self._store = batches
        self._worker = worker

    @property
    def _batches(self) -> BatchStore:
        if self._store is None:
            raise no_database("Batches")
        return self._store

    async def create(self, request: Request) -> Response:
        batches, files = self._batches, self._files
        body = await parse(request, BatchRequest, self._state.settings.max_body_bytes)
        if body.endpoint not in ENDPOINTS:
            raise ApiError(
                f"endpoint is one of {', '.join(ENDPOINTS)}; got {body.endpoint[:40]!r}.",
                param="endpoint",
            )
        if body.completion_window != "24h":
            raise ApiError(
                f"completion_window is '24h', got {body.completion_window[:40]!r}.",
                param="completion_window",
            )
        owner = requester()
        without_nul(body.input_file_id, "input_file_id")
        file = files and await asyncio.to_thread(files.get, body.input_file_id, owner.project_id)
        if not file:
            raise not_found("file", body.input_file_id)
        if file.purpose != "batch":
            raise ApiError(
                f"The file's purpose is {file.purpose!r}; a batch needs 'batch'.",
                param="input_file_id",
            )
        batch = await asyncio.to_thread(batches.create, body, owner)
        if self._worker is not None:
            self._worker.wake()
        return json_response(batch)

    async def page(self, request: Request) -> Response:
        limit = page_limit(request, 20, largest=100)
        found, has_more = await asyncio.to_thread(
            self._batches.page,
            requester().project_id,
            after=without_nul(request.query_params.get("after"), "after"),
            limit=limit,
        )
        ids = [batch.id for batch in found]
        return json_response(
            BatchList(
                data=found,
                first_id=ids[0] if ids else None,
                last_id=ids[-1] if ids else None,
                has_more=has_more,
            )
        )

    async def retrieve(self, request: Request) -> Response:
        batch_id = path_id(request, "batch_id", "batch")
        found = await asyncio.to_thread(self._batches.get, batch_id, requester().project_id)
        if found is None:
            raise not_found("batch", batch_id)
        return json_response(found)

    async def cancel(self, request: Request) -> Response:
        batch_id = path_id(request, "batch_id", "batch")
        project = requester().project_id
        found = await asyncio.to_thread(self._batches.get, batch_id, project)
        if found is None:
            raise not_found("batch", batch_id)
        if found.status not in ("cancelling", "cancelled"):
            done = await asyncio.to_thread(self._batches.ask_to_cancel, batch_id, project)
            if not done:
                raise ApiError(
                    f"Batch {batch_id!r} is {found.status} and cannot be cancelled.",
                    status=409,
                    code="batch_ended",
                )
            found = await asyncio.to_thread(self._batches.get, batch_id, project)
        return json_response(found)


def batch_operations(
    state: State,
    files: FileStore | None,
    batches: BatchStore | None,
    worker: BatchWorker | None,
) -> list[Operation]:
    """The routes of files and batches; without a database they say that they need one."""
    file = FileRoutes(state, files)
    batch = BatchRoutes(state, files, batches, worker)
    if worker is not None:  # a line is a body of a request
        worker.max_line_bytes = state.settings.max_body_bytes
    rows = (
        ("POST", "/v1/files", file.create, "Upload a file", None, FileObject),
        ("GET", "/v1/files", file.page, "Files of this project", None, FileList),
        ("GET", "/v1/files/{file_id}", file.retrieve, "One file", None, FileObject),
        ("DELETE", "/v1/files/{file_id}", file.delete, "Remove a file", None, FileDeleted),
        ("GET", "/v1/files/{file_id}/content", file.content, "A file's bytes", None, None),
        ("POST", "/v1/batches", batch.create, "Run a file of requests", BatchRequest, Batch),
        ("GET", "/v1/batches", batch.page, "Batches of this project", None, BatchList),
        ("GET", "/v1/batches/{batch_id}", batch.retrieve, "One batch", None, Batch),
        ("POST", "/v1/batches/{batch_id}/cancel", batch.cancel, "Stop a batch", None, Batch),
    )
    return [
        Operation(
            method=method, path=path, handler=handler, summary=summary, request=given,
            response=answer,
            media_type="application/octet-stream" if path.endswith("content") else
            "application/json",
        )
        for method, path, handler, summary, given, answer in rows
    ]  # fmt: skip


def no_database(what: str) -> ApiError:
    return ApiError(
        f"{what} need a database, and this server runs without one (start it with --database).",
        code="no_database",
    )


def page_limit(request: Request, default: int, *, largest: int) -> int:
    text = request.query_params.get("limit", str(default))
    number = _number(text)
    if number is None or not 1 <= number <= largest:
        raise ApiError(f"limit is from 1 to {largest}, got {text[:40]!r}.", param="limit")
    return number


def path_id(request: Request, name: str, kind: str) -> str:
    """Return an id of the path; one with NUL, which PostgreSQL refuses, names nothing."""
    given: str = request.path_params[name]
    if "\0" in given:
        raise not_found(kind, given)
    return given


def without_nul(text: str | None, param: str) -> str | None:
    """Return a text of the client that a database shall see. Raises: ApiError."""
    if text is not None and "\0" in text:
        raise ApiError(f"{param} must not hold the character NUL.", param=param)
    return text


def _number(text: object) -> int | None:
    """Return a short decimal number, None for anything else."""
    is_number = isinstance(text, str) and len(text) <= 16 and text.isascii() and text.isdigit()
    return int(text) if is_number else None  # type: ignore[call-overload]


def _expires_s(form: Any) -> int | None:
    """Return `expires_after[seconds]` of a form."""
    text = form.get("expires_after[seconds]")
    if text is None:
        return None
    number = _number(text)
    if number is None or not 3600 <= number <= 2_592_000:
        raise ApiError(
            f"expires_after[seconds] is from 3600 to 2592000, got {str(text)[:40]!r}.",
            param="expires_after",
        )
    return number


def _parts(file: Any) -> Iterator[bytes]:
    file.seek(0)
    while part := file.read(1 << 20):
        yield part


async def _limited(stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    size = 0
    async for part in stream:
        size += len(part)
        if size > MAX_UPLOAD_BYTES + _FORM_BYTES:
            raise too_large(MAX_UPLOAD_BYTES)
        yield part
