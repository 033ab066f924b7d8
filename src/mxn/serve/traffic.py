"""What every request counts for: requests, tokens, money, refusals, waits; ours and foreign models.

Plain numbers in dictionaries, turned into Prometheus families when somebody scrapes, so that a
request costs a few dictionary look-ups. On the event loop only. Knows nothing of replicas' inner
state; start at `Traffic.ended` and `Traffic.settled`.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator
from itertools import pairwise
from typing import Any

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from mxn.ledger.types import Receipt, Settlement
from mxn.serve.context import RequestContext
from mxn.serve.metrics import Metrics

MAX_LABELS = 1000  # combinations in one table; more are counted under OTHER
MAX_HISTOGRAMS = 200  # each is a line for every bound
OTHER = "other"

_WAITS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_WHOLE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_BROKEN = frozenset({"replica_lost", "timeout", "error"})
_VARIABLE = re.compile(r"{(\w+)}")

Labels = tuple[str, ...]


class Table:
    """A counter with labels. `kept` are the labels that stay when there are too many rows."""

    def __init__(self, name: str, text: str, labels: Labels, kept: Collection[str] = ()) -> None:
        self.name, self.text, self.labels = name, text, labels
        self._kept = [label in kept for label in labels]
        self.values: dict[Labels, float] = {}

    def add(self, key: Labels, amount: float = 1) -> None:
        values = self.values
        try:
            values[key] += amount
        except KeyError:
            if len(values) >= MAX_LABELS:
                pairs = zip(key, self._kept, strict=True)
                key = tuple(value if kept else OTHER for value, kept in pairs)
            values[key] = values.get(key, 0) + amount

    def family(self) -> Metric:
        family = CounterMetricFamily(self.name, self.text, labels=self.labels)
        for key, value in self.values.items():
            family.add_metric(key, value)
        return family


class Waits:
    """A histogram of seconds with labels; when there are too many rows, more are OTHER."""

    def __init__(self, name: str, text: str, labels: Labels, bounds_s: tuple[float, ...]) -> None:
        self.name, self.text, self.labels, self.bounds_s = name, text, labels, bounds_s
        self._counts: dict[Labels, list[int]] = {}
        self._sums_s: dict[Labels, float] = {}

    def add(self, key: Labels, seconds: float) -> None:
        if key not in self._counts:
            if len(self._counts) >= MAX_HISTOGRAMS:
                key = (OTHER,) * len(key)
            self._counts.setdefault(key, [0] * (len(self.bounds_s) + 1))
            self._sums_s.setdefault(key, 0.0)
        self._counts[key][bisect_left(self.bounds_s, seconds)] += 1
        self._sums_s[key] += seconds

    def family(self) -> Metric:
        family = HistogramMetricFamily(self.name, self.text, labels=self.labels)
        names = [*map(str, self.bounds_s), "+Inf"]
        for key, counts in self._counts.items():
            buckets, total = [], 0
            for name, count in zip(names, counts, strict=True):
                total += count
                buckets.append((name, total))
            family.add_metric(key, buckets, self._sums_s[key])
        return family


class Traffic(Collector):
    """The counts of one server."""

    def __init__(self) -> None:
        self.metrics: Metrics | None = (
            None  # of the same server, for what both kinds of models have
        )
        self.paths: frozenset[str] = frozenset()  # of all routes, such as /v1/files/{file_id}
        self.requests = Table(
            "mxn_requests",
            "Requests that ended, by endpoint, HTTP status (499: the client was gone) and model",
            ("endpoint", "status", "model"),
            kept=("status",),
        )
        self.tokens = Table(
            "mxn_tokens",
            "Tokens by kind; input includes cached, output includes reasoning",
            ("kind", "model", "chip"),
            kept=("kind",),
        )
        self.cost = Table(
            "mxn_cost_micro",
            "What settled requests cost, in millionths of the currency",
            ("model", "chip", "org", "currency"),
            kept=("currency",),
        )
        self.failovers = Table(
            "mxn_failovers", "Times that a request went on from another replica", ("model",)
        )
        self.broken = Table(
            "mxn_broken_streams",
            "Answers that had begun with status 200 and ended with an error, by reason",
            ("reason", "model"),
            kept=("reason",),
        )
        self.refusals = Table(
            "mxn_refusals",
            "Requests that were refused for a budget or a rate limit",
            ("reason", "model"),
            kept=("reason",),
        )
        self.ledger_s = Waits(
            "mxn_ledger_seconds", "Time until a row was open or settled", ("operation",), _WAITS_S
        )
        self.whole_s = Waits(
            "mxn_http_request_seconds",
            "Arrival to the end of the answer",
            ("endpoint", "model"),
            _WHOLE_S,
        )
        # By (model, replica), for servers that do not count for us; shown with the replicas.
        self.made = Table("", "Output tokens of settled requests", ("model", "replica"))
        self.lost = Table("", "Requests that another replica took over", ("model", "replica"))
        self._families: list[Callable[[], Any]] = [
            table.family
            for table in (
                self.requests, self.tokens, self.cost, self.failovers, self.broken,
                self.refusals, self.ledger_s, self.whole_s,
            )
        ]  # fmt: skip

    def endpoint_of(self, scope: Scope) -> str:
        """Return the path of the route that a request was for, without ids."""
        path = scope["path"]
        if path in self.paths and "{" not in path:
            return path
        return endpoint_of(scope, self.paths)

    def ended(self, context: RequestContext, scope: Scope, status: int) -> None:
        """A request is over; see `gateway.OnEnd`."""
        endpoint = scope["path"]
        if endpoint not in self.paths or "{" in endpoint:
            endpoint = self.endpoint_of(scope)
        model = context.model
        self.requests.add((endpoint, str(status), model))
        if status == 200 and context.reason in _BROKEN:
            self.broken.add((context.reason, model))
        if context.refusal:
            self.refusals.add((context.refusal, model))
        self.whole_s.add((endpoint, model), time.perf_counter() - context.arrived_s)
        if len(context.hops) > 1:
            for before, hop in pairwise(context.hops):
                if hop.is_takeover:
                    self.failovers.add((model,))
                    self.lost.add((model, before.replica))

    def began(self, context: RequestContext) -> None:
        """The first piece of a foreign server's stream is here; of our own, `Trace` says so."""
        if self.metrics is not None:
            waited_s = time.perf_counter() - context.arrived_s
            self.metrics.model(context.model).first_token.observe(waited_s)

    def settled(self, context: RequestContext, used: Settlement, receipt: Receipt | None) -> None:
        """The row of a request was settled; `receipt` None: it is accounted nowhere."""
        model, chip, add = context.model, used.chip, self.tokens.add
        if used.input_tokens:
            add(("input", model, chip), used.input_tokens)
        if used.cached_tokens:
            add(("cached", model, chip), used.cached_tokens)
        if used.output_tokens:
            add(("output", model, chip), used.output_tokens)
            self.made.add((model, used.replica), used.output_tokens)
        if used.reasoning_tokens:
            add(("reasoning", model, chip), used.reasoning_tokens)
        if receipt is not None and receipt.currency and receipt.is_new:
            who = context.principal
            org = who.org_id if who is not None else ""
            self.cost.add((model, chip, org, receipt.currency), receipt.cost_micro)

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            yield family()


def endpoint_of(scope: Scope, paths: Collection[str]) -> str:
    """Return the path of the route that matched, such as /v1/files/{file_id}; else OTHER."""
    params = scope.get("path_params") or {}
    for path in paths if params else ():
        plain = path.replace(":path", "")
        # Filled in rather than cut out: an id may look like any other part of the path.
        is_alike = set(_VARIABLE.findall(plain)) == set(params)
        if is_alike and plain.format(**params) == scope["path"]:
            return plain
    return OTHER
