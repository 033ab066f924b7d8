"""Checks an input file of a batch line by line. Pure: lines in, requests and errors out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from mxn.serve.batch.types import BatchError, InputLine

MAX_LINES = 50_000
MAX_INPUTS = 50_000  # of embeddings, over all lines
MAX_FILE_BYTES = 200 << 20
MAX_LINE_BYTES = 32 << 20  # unless the server's limit of a body is another one
_MAX_ERRORS = 100  # more of them help nobody
_MAX_ECHO = 100  # characters of what a client wrote that a message repeats

_decoder = msgspec.json.Decoder(InputLine)


class _Head(msgspec.Struct):
    """What is looked at of a body; the rest is passed on as it was written."""

    model: msgspec.Raw = msgspec.Raw(b"null")
    stream: msgspec.Raw = msgspec.Raw(b"null")
    input: msgspec.Raw = msgspec.Raw(b"null")
    background: msgspec.Raw = msgspec.Raw(b"null")


_head_decoder = msgspec.json.Decoder(_Head)


@dataclass(slots=True)
class Checked:
    """What a file holds; it may run when `errors` is empty."""

    model: str | None = None
    lines: list[tuple[str, str]] = field(default_factory=list)  # (custom_id, body as JSON)
    errors: list[BatchError] = field(default_factory=list)


def check_lines(
    lines: Iterable[bytes], endpoint: str, *, max_line_bytes: int = MAX_LINE_BYTES
) -> Checked:
    """Check every line of a file for `endpoint`; blank lines are passed over."""
    checked = Checked()
    seen: set[str] = set()
    num_inputs = 0
    number = 0
    for number, line in enumerate(lines, start=1):
        if len(line) > max_line_bytes:
            message = f"the line has more than {max_line_bytes} bytes."
            checked.errors.append(BatchError(code="line_too_long", message=message, line=number))
            break
        if not line.strip():
            continue
        if len(checked.lines) >= MAX_LINES:
            checked.errors.append(_too_many(f"more than {MAX_LINES} requests", number))
            break
        try:
            request = _decoder.decode(line)
            head = _head_decoder.decode(request.body)
            body = bytes(request.body).decode()
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            checked.errors.append(
                BatchError(code="invalid_json_line", message=str(exc)[:300], line=number)
            )
        else:
            error = _problem(request, head, endpoint, checked, seen)
            num_inputs += _num_inputs(head) if endpoint == "/v1/embeddings" else 0
            if num_inputs > MAX_INPUTS:
                error = _too_many(f"more than {MAX_INPUTS} inputs in all lines", number)
            if error is not None:
                error.line = number
                checked.errors.append(error)
            else:
                checked.lines.append((request.custom_id, body))
            seen.add(request.custom_id)
        if len(checked.errors) >= _MAX_ERRORS:
            break
    if not checked.lines and not checked.errors:
        checked.errors.append(BatchError(code="empty_file", message="The file has no requests."))
    return checked


def _problem(
    request: InputLine, head: _Head, endpoint: str, checked: Checked, seen: set[str]
) -> BatchError | None:
    if "\0" in request.custom_id:
        message = "custom_id must not hold the character NUL."
        return BatchError(code="invalid_custom_id", message=message, param="custom_id")
    if request.custom_id in seen:
        message = f"custom_id {_cut(request.custom_id)} stands in an earlier line too."
        return BatchError(code="duplicate_custom_id", message=message, param="custom_id")
    if request.method != "POST":
        message = f"method is 'POST', got {_cut(request.method)}."
        return BatchError(code="invalid_method", message=message, param="method")
    if request.url != endpoint:
        message = f"url is the batch's endpoint {endpoint!r}, got {_cut(request.url)}."
        return BatchError(code="invalid_url", message=message, param="url")
    if bytes(head.stream) not in (b"null", b"false"):
        message = "a request of a batch cannot be streamed."
        return BatchError(code="invalid_request", message=message, param="body.stream")
    if endpoint == "/v1/responses" and bytes(head.background) not in (b"null", b"false"):
        message = "a request of a batch is in the background already; its answer is in the file."
        return BatchError(code="invalid_request", message=message, param="body.background")
    model = _text(head.model)
    if not model or "\0" in model:
        message = "model is required: a name without the character NUL."
        return BatchError(code="model_required", message=message, param="body.model")
    if checked.model is None:
        checked.model = model
    if model != checked.model:
        message = (
            f"a file is for one model: earlier lines name {_cut(checked.model)}, got {_cut(model)}."
        )
        return BatchError(code="mismatched_model", message=message, param="body.model")
    return None


def _num_inputs(head: _Head) -> int:
    """Count texts and lists of tokens; a list of numbers is one input."""
    raw = bytes(head.input)
    if raw[:1] != b"[" or raw[1:64].lstrip()[:1] not in (b'"', b"["):
        return 1
    return len(msgspec.json.decode(raw, type=list[msgspec.Raw]))


def _text(raw: msgspec.Raw) -> str:
    """Return a string of JSON, "" for anything else."""
    return msgspec.json.decode(raw, type=str) if bytes(raw)[:1] == b'"' else ""


def _cut(text: str) -> str:
    """Return what a client wrote, fit for a message."""
    return repr(text) if len(text) <= _MAX_ECHO else f"{text[:_MAX_ECHO]!r}…"


def _too_many(what: str, line: int) -> BatchError:
    return BatchError(code="too_many_requests", message=f"The file has {what}.", line=line)
