"""OpenTelemetry: a span for each request, with its waits and replicas as children.

Nothing of it runs, and no SDK is needed, unless a place to send spans to is named. Prompts, answers
and keys are in no attribute. Start at `Tracing.open`; see `gateway.OnBegin` and `gateway.OnEnd`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from mxn.errors import ConfigError
from mxn.serve.context import Hop, RequestContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_UNTRACED = frozenset({"/health", "/ping", "/metrics", "/load", "/version"})
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_propagator = TraceContextTextMapPropagator()


class Tracing:
    """Makes spans of requests. `on_begin` and `on_end` are hooks of the gateway."""

    def __init__(self, tracer: Tracer, provider: Any = None) -> None:
        self._tracer = tracer
        self._provider = provider

    @classmethod
    def open(cls, endpoint: str | None, service: str) -> Tracing | None:
        """Return what sends spans to an OTLP collector; None when none is named.

        `endpoint` is its base URL, such as http://127.0.0.1:4318; without it the variables of
        OpenTelemetry count. Raises: ConfigError when the SDK is not installed.
        """
        if endpoint is None and not any(os.environ.get(name) for name in _ENDPOINTS):
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise ConfigError(
                "traces need OpenTelemetry's SDK", hint="pip install 'mxn[otel]'"
            ) from error
        url = None if endpoint is None else endpoint.rstrip("/") + "/v1/traces"
        return cls.to(OTLPSpanExporter(endpoint=url), service)

    @classmethod
    def to(cls, exporter: SpanExporter, service: str) -> Tracing:
        """Return what gives spans to an exporter, in a thread."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        import mxn

        resource = Resource.create({"service.name": service, "service.version": mxn.__version__})
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider.get_tracer("mxn", mxn.__version__), provider)

    def on_begin(self, context: RequestContext, scope: Scope) -> None:
        """Begin the span; what is sent to replicas from now on carries its id."""
        if scope["path"] in _UNTRACED:
            return
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        span = self._tracer.start_span(
            f"{scope['method']} {scope['path'][:64]}",
            context=_propagator.extract(carrier),
            kind=SpanKind.SERVER,
        )
        if not span.get_span_context().is_valid:
            return
        sent: dict[str, str] = {}
        _propagator.inject(sent, context=trace.set_span_in_context(span))
        context.trace = span
        context.traceparent = sent["traceparent"].encode()

    def on_end(self, context: RequestContext, scope: Scope, status: int) -> None:
        """End the span with what is known of the request now, and add its parts."""
        span = context.trace
        if span is None or not span.is_recording():
            return
        # Times are kept on a clock that never jumps; spans want the time of day.
        offset_ns = time.time_ns() - round(1e9 * time.perf_counter())
        route = scope["path"] if context.traffic is None else context.traffic.endpoint_of(scope)
        span.update_name(f"{scope['method']} {route}")
        span.set_attributes(dict(_attributes(context, scope, route, status)))
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        parent = trace.set_span_in_context(span)
        for name, begun_s, end_s, attributes in _parts(context, time.perf_counter()):
            child = self._tracer.start_span(
                name,
                context=parent,
                kind=SpanKind.CLIENT if attributes else SpanKind.INTERNAL,
                attributes=attributes,
                start_time=offset_ns + round(1e9 * begun_s),
            )
            child.end(offset_ns + round(1e9 * end_s))
        span.end()

    def close(self) -> None:
        """Send what is left. Blocking, for a few seconds at most."""
        if self._provider is not None:
            self._provider.shutdown()


def _attributes(
    context: RequestContext, scope: Scope, route: str, status: int
) -> Iterator[tuple[str, Any]]:
    yield "http.request.method", scope["method"]
    yield "http.route", route
    yield "http.response.status_code", status
    yield "mxn.request_id", context.request_id
    if status >= 400:
        yield "error.type", context.refusal or context.reason or str(status)
    if context.principal is not None:
        yield "mxn.org", context.principal.org_id
        yield "mxn.project", context.principal.project_id
        yield "mxn.key", context.principal.key_id  # its id, never the key
    if not context.model:
        return
    yield "gen_ai.operation.name", _OPERATIONS.get(route.removeprefix("/maas"), "chat")
    yield "gen_ai.request.model", context.model
    if context.reason is None:
        return
    yield "gen_ai.usage.input_tokens", context.input_tokens
    yield "gen_ai.usage.output_tokens", context.output_tokens
    yield "mxn.cached_tokens", context.cached_tokens
    yield "mxn.reasoning_tokens", context.reasoning_tokens
    yield "mxn.reason", context.reason
    yield "mxn.is_stream", context.is_stream
    if context.currency:
        yield "mxn.cost_micro", context.cost_micro
        yield "mxn.currency", context.currency


def _parts(
    context: RequestContext, now_s: float
) -> Iterator[tuple[str, float, float, dict[str, Any] | None]]:
    """Yield (name, begin, end, attributes) of what a request waited for."""
    for name, begun_s, took_s in (
        ("ledger open", context.ledger_open_begun_s, context.ledger_open_s),
        ("ledger settle", context.ledger_settle_begun_s, context.ledger_settle_s),
    ):
        if begun_s:
            yield name, begun_s, begun_s + took_s, None
    hops = context.hops
    if hops and context.queue_s:
        yield "queue", hops[0].begun_s - context.queue_s, hops[0].begun_s, None
    for at, hop in enumerate(hops):
        following = (later.begun_s for later in hops[at + 1 :] if later.is_takeover)
        end_s = next(following, now_s)
        yield "replica", hop.begun_s, end_s, _of_hop(hop)


def _of_hop(hop: Hop) -> dict[str, Any]:
    return {
        "mxn.replica": hop.replica,
        "mxn.chip": hop.chip,
        "mxn.route": hop.reason,
        "mxn.resumed_tokens": hop.resumed_tokens,
        "mxn.is_takeover": hop.is_takeover,
    }
