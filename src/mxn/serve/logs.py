"""One line of JSON for each request: who, what, how long, how much. Never a prompt or a key."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec
from starlette.types import Scope

from mxn.serve.context import RequestContext

_MAX_PATH = 512  # characters; what is longer is no route of ours


class RequestLog:
    """Called when a request is over; see `gateway.OnEnd`."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._encode = msgspec.json.Encoder().encode
        self._num_lost = 0  # lines that could not be written since the last one that was

    def __call__(self, context: RequestContext, scope: Scope, status: int) -> None:
        line = line_of(context, scope, status)
        if self._num_lost:
            line["lost_lines"] = self._num_lost
        try:
            self._out.write(self._encode(line).decode() + "\n")
        except OSError:
            self._num_lost += 1  # a full disk must not fail requests; the next line tells
        else:
            self._num_lost = 0


def line_of(context: RequestContext, scope: Scope, status: int) -> dict[str, Any]:
    """Return what is logged; `time` is in Unix seconds, `at` the same for people."""
    now_s = time.time()
    took_s = time.perf_counter() - context.arrived_s
    who = context.principal
    return {
        "time": now_s,
        "at": datetime.fromtimestamp(now_s, UTC).isoformat(timespec="milliseconds"),
        "request_id": context.request_id,
        "method": scope["method"],
        "path": scope["path"][:_MAX_PATH],
        "status": status,
        "reason": context.reason,
        "refusal": context.refusal or None,
        "is_stream": context.is_stream,
        "took_ms": _ms(took_s),
        "own_ms": _ms(took_s - context.upstream_s),
        "queue_ms": _ms(context.queue_s),
        "ledger_ms": _ms(context.ledger_open_s + context.ledger_settle_s),
        "model": context.model,
        "org": who.org_id if who else None,
        "project": who.project_id if who else None,
        "key": who.key_id if who else None,
        "replicas": [hop.replica for hop in context.hops],
        "chips": [hop.chip for hop in context.hops],
        "input_tokens": context.input_tokens,
        "cached_tokens": context.cached_tokens,
        "output_tokens": context.output_tokens,
        "reasoning_tokens": context.reasoning_tokens,
        "cost_micro": context.cost_micro,
        "currency": context.currency or None,
        "batch": context.batch_id,
    }


def _ms(seconds: float) -> float:
    return round(1000 * max(0.0, seconds), 3)
