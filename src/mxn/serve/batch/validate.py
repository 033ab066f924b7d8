"""Checks an input file of a batch line by line. Pure: lines in, requests and errors out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from mxn.serve.batch.types import BatchError, InputLine

MAX_LINES = 50_000
MAX_INPUTS = 50_000  # of embeddings, over all lines
MAX_FILE_BYTES = 200 << 20
_MAX_ERRORS = 100  # more of them help nobody

_decoder = msgspec.json.Decoder(InputLine)


@dataclass(slots=True)
class Checked:
    """What a file holds; it may run when `errors` is empty."""

    model: str | None = None
    lines: list[tuple[str, str]] = field(default_factory=list)  # (custom_id, body as JSON)
    errors: list[BatchError] = field(default_factory=list)


def check_lines(lines: Iterable[bytes], endpoint: str) -> Checked:
    """Check every line of a file for `endpoint`; blank lines are passed over."""
    checked = Checked()
    seen: set[str] = set()
    num_inputs = 0
    number = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if len(checked.lines) >= MAX_LINES:
            checked.errors.append(_too_many(f"more than {MAX_LINES} requests", number))
            break
        try:
            request = _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            checked.errors.append(
                BatchError(code="invalid_json_line", message=str(exc), line=number)
            )
        else:
            error = _problem(request, endpoint, checked, seen)
            num_inputs += _num_inputs(request) if endpoint == "/v1/embeddings" else 0
            if num_inputs > MAX_INPUTS:
                error = _too_many(f"more than {MAX_INPUTS} inputs in all lines", number)
            if error is not None:
                error.line = number
                checked.errors.append(error)
            else:
                body = msgspec.json.encode(request.body).decode()
                checked.lines.append((request.custom_id, body))
            seen.add(request.custom_id)
        if len(checked.errors) >= _MAX_ERRORS:
            break
    if not checked.lines and not checked.errors:
        checked.errors.append(BatchError(code="empty_file", message="The file has no requests."))
    return checked


def _problem(
    request: InputLine, endpoint: str, checked: Checked, seen: set[str]
) -> BatchError | None:
    if request.custom_id in seen:
        message = f"custom_id {request.custom_id!r} stands in an earlier line too."
        return BatchError(code="duplicate_custom_id", message=message, param="custom_id")
    if request.method != "POST":
        message = f"method is 'POST', got {request.method!r}."
        return BatchError(code="invalid_method", message=message, param="method")
    if request.url != endpoint:
        message = f"url is the batch's endpoint {endpoint!r}, got {request.url!r}."
        return BatchError(code="invalid_url", message=message, param="url")
    if request.body.get("stream"):
        message = "a request of a batch cannot be streamed."
        return BatchError(code="invalid_request", message=message, param="body.stream")
    model = request.body.get("model")
    if not isinstance(model, str) or not model:
        message = "model is required."
        return BatchError(code="model_required", message=message, param="body.model")
    if checked.model is None:
        checked.model = model
    if model != checked.model:
        message = f"a file is for one model: earlier lines name {checked.model!r}, got {model!r}."
        return BatchError(code="mismatched_model", message=message, param="body.model")
    return None


def _num_inputs(request: InputLine) -> int:
    value = request.body.get("input")
    is_several = isinstance(value, list) and value and not isinstance(value[0], int)
    return len(value) if is_several else 1  # type: ignore[arg-type]


def _too_many(what: str, line: int) -> BatchError:
    return BatchError(code="too_many_requests", message=f"The file has {what}.", line=line)
