"""Response headers that say which replica was chosen and why."""

from __future__ import annotations

from collections.abc import Iterable

from mxn.serve.context import RequestContext

_MAX_CHARS = 200


def route_headers(context: RequestContext) -> dict[str, str]:
    """Return `x-mxn-chip`, `x-mxn-replica` and `x-mxn-route`; nothing while none was chosen.

    Several choices of one request may run on several replicas: each is named once. Call it when
    the headers are sent, which for streams is at the first event.
    """
    hops = context.hops
    if not hops:
        return {}
    return {
        "x-mxn-chip": _joined(hop.chip for hop in hops),
        "x-mxn-replica": _joined(hop.replica for hop in hops),
        "x-mxn-route": _clean(hops[-1].reason),
    }


def _joined(names: Iterable[str]) -> str:
    return _clean(",".join(dict.fromkeys(names)))


def _clean(text: str) -> str:
    """Return `text` as a header value: printable ASCII, not endless."""
    if len(text) <= _MAX_CHARS and text.isascii() and text.isprintable():
        return text
    return "".join(char if " " <= char <= "~" else "?" for char in text[:_MAX_CHARS])
