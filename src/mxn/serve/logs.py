"""One line of JSON for each request: who, what, how long, how much. Never a prompt or a key."""

from __future__ import annotations

import sys
import time
from typing import TextIO

import msgspec
from starlette.types import Scope

from mxn.serve.context import RequestContext


class RequestLog:
    """Called when a request is over; see `gateway.OnEnd`."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr

    def __call__(self, context: RequestContext, scope: Scope, status: int) -> None:
        took_s = time.perf_counter() - context.arrived_s
        who = context.principal
        line = {
            "time": time.time(),
            "request_id": context.request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "took_ms": round(1000 * took_s, 3),
            "own_ms": round(1000 * max(0.0, took_s - context.upstream_s), 3),
            "model": context.model,
            "org": who.org_id if who else None,
            "project": who.project_id if who else None,
            "key": who.key_id if who else None,
            "replicas": [hop.replica for hop in context.hops],
            "chips": [hop.chip for hop in context.hops],
            "input_tokens": context.input_tokens,
            "output_tokens": context.output_tokens,
            "cost_micro": context.cost_micro,
            "batch": context.batch_id,
        }
        self._out.write(msgspec.json.encode(line).decode() + "\n")
