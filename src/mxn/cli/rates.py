"""What happened between two looks at a server: rates, quantiles and money, by model and replica.

Pure: takes the texts of /metrics, /load and /health, and times. Start at `summarize`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec

_PROBES = frozenset({"/health", "/ping", "/metrics", "/load", "/version", "/openapi.json"})
_OTHER = ("", "other")  # no model, or one of too many

Series = Mapping[frozenset[tuple[str, str]], float]


class ModelRates(msgspec.Struct, kw_only=True):
    """One model; None: nothing was measured. Latency is of whole requests that ended."""

    model: str
    state: str
    requests_per_s: float
    errors_per_s: float  # status 5xx, and streams that broke
    refused_per_s: float  # status 429
    input_tokens_per_s: float
    output_tokens_per_s: float
    running: int
    waiting: int  # inside replicas
    queued: int  # before any replica has room
    latency_p50_s: float | None
    latency_p95_s: float | None
    first_token_p50_s: float | None
    first_token_p95_s: float | None
    cost_micro_per_min: dict[str, int]  # by currency


class ReplicaRates(msgspec.Struct, kw_only=True):
    model: str
    replica: str
    chip: str
    state: str
    running: int
    waiting: int | None
    kv_used: float | None  # 0 to 1
    tokens_per_s: float
    lost: int  # since the server's start


class Summary(msgspec.Struct, kw_only=True):
    """A server over `seconds`; probes do not count as requests."""

    url: str
    state: str
    seconds: float
    requests_per_s: float
    errors_per_s: float
    refused_per_s: float
    failovers: int
    ledger_p95_s: float | None  # of opening and settling
    cost_micro_per_min: dict[str, int]
    models: list[ModelRates]
    replicas: list[ReplicaRates]


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a server said at one time. `at_s` is on any steady clock."""

    at_s: float
    series: Mapping[str, Series]
    load: Mapping[str, Any]
    health: Mapping[str, Any]

    @classmethod
    def read(cls, at_s: float, metrics: str, load: Any, health: Any) -> Look:
        """Raises: ValueError for a text that is not Prometheus's."""
        from prometheus_client.parser import text_string_to_metric_families

        series: dict[str, dict[frozenset[tuple[str, str]], float]] = defaultdict(dict)
        for family in text_string_to_metric_families(metrics):
            for sample in family.samples:
                if sample.name.startswith("mxn_"):
                    series[sample.name][frozenset(sample.labels.items())] = sample.value
        return cls(at_s=at_s, series=dict(series), load=load, health=health)


class Window:
    """The difference of two looks."""

    def __init__(self, before: Look, after: Look) -> None:
        self.seconds = max(1e-3, after.at_s - before.at_s)
        self.after = after
        self._before = before
        self._changes: dict[str, list[tuple[dict[str, str], float]]] = {}

    def changes(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Return (labels, growth) of each series. A counter that fell has begun again from zero."""
        if name not in self._changes:
            old = self._before.series.get(name, {})
            self._changes[name] = [
                (dict(key), value - old.get(key, 0.0) if value >= old.get(key, 0.0) else value)
                for key, value in self.after.series.get(name, {}).items()
            ]
        return self._changes[name]

    def grown(self, name: str, **where: str) -> float:
        wanted = where.items()
        return sum(growth for labels, growth in self.changes(name) if wanted <= labels.items())

    def by(self, name: str, label: str, **where: str) -> dict[str, float]:
        """Return the growth by one label."""
        found: dict[str, float] = defaultdict(float)
        for labels, growth in self.changes(name):
            if where.items() <= labels.items():
                found[labels.get(label, "")] += growth
        return dict(found)

    def has(self, name: str, **where: str) -> bool:
        """Whether a counter is above zero, also if it did not grow."""
        series = self.after.series.get(name, {})
        return any(
            value > 0 and where.items() <= dict(key).items() for key, value in series.items()
        )

    def quantile(self, name: str, share: float, **where: str) -> float | None:
        """Return a quantile of a histogram's growth, as PromQL does: linear within a bucket.

        In the last, open bucket it is that bucket's lower bound. None: nothing was observed.
        """
        counts = {
            float(bound): count for bound, count in self.by(f"{name}_bucket", "le", **where).items()
        }
        bounds = sorted(counts)
        if not bounds or counts[bounds[-1]] <= 0:
            return None
        target = share * counts[bounds[-1]]
        for (low, under), (high, upto) in pairwise([(0.0, 0.0), *((b, counts[b]) for b in bounds)]):
            if upto >= target:
                if high == float("inf"):
                    return low
                return low + (high - low) * (target - under) / max(upto - under, 1e-9)
        return bounds[-2]


def summarize(url: str, before: Look, after: Look) -> Summary:
    """Return the rates between two looks at the server of that URL."""
    window = Window(before, after)
    per_s = 1 / window.seconds
    requests = errors = refused = 0.0
    for labels, growth in window.changes("mxn_requests_total"):
        if labels["endpoint"] not in _PROBES:
            requests += growth
            errors += growth * labels["status"].startswith("5")
            refused += growth * (labels["status"] == "429")
    return Summary(
        url=url,
        state=after.health.get("status", "?"),
        seconds=round(window.seconds, 3),
        requests_per_s=requests * per_s,
        errors_per_s=(errors + window.grown("mxn_broken_streams_total")) * per_s,
        refused_per_s=refused * per_s,
        failovers=int(window.grown("mxn_failovers_total")),
        ledger_p95_s=window.quantile("mxn_ledger_seconds", 0.95),
        cost_micro_per_min=_cost(window),
        models=[_model(window, name) for name in _names(window)],
        replicas=[_replica(window, row) for row in after.load.get("replicas", ())],
    )


def _names(window: Window) -> list[str]:
    """Return the models that are served, and other names that requests were billed by."""
    served = [*window.after.health.get("models", {}), *window.after.load.get("models", {})]
    active = [name for name, growth in window.by("mxn_requests_total", "model").items() if growth]
    return list(dict.fromkeys([*served, *(name for name in active if name not in _OTHER)]))


def _model(window: Window, name: str) -> ModelRates:
    load = window.after.load.get("models", {}).get(name) or {}
    state = window.after.health.get("models", {}).get(name, {}).get("status", "")
    status = window.by("mxn_requests_total", "status", model=name)
    failed = sum(growth for code, growth in status.items() if code.startswith("5"))
    failed += window.grown("mxn_broken_streams_total", model=name)
    per_s = 1 / window.seconds
    p50, p95 = _latency(window, name)
    first = "mxn_time_to_first_token_seconds"
    return ModelRates(
        model=name,
        state=state,
        requests_per_s=sum(status.values()) * per_s,
        errors_per_s=failed * per_s,
        refused_per_s=status.get("429", 0.0) * per_s,
        input_tokens_per_s=_tokens(window, name, "input", "mxn_prompt_tokens_total") * per_s,
        output_tokens_per_s=_tokens(window, name, "output", "mxn_generation_tokens_total") * per_s,
        running=load.get("running", 0),
        waiting=load.get("waiting", 0),
        queued=load.get("queued", 0),
        latency_p50_s=p50,
        latency_p95_s=p95,
        first_token_p50_s=window.quantile(first, 0.5, model_name=name),
        first_token_p95_s=window.quantile(first, 0.95, model_name=name),
        cost_micro_per_min=_cost(window, model=name),
    )


def _latency(window: Window, name: str) -> tuple[float | None, float | None]:
    """Return p50 and p95: of answers where we made them, else of all requests for the model."""
    whole = "mxn_e2e_request_latency_seconds"
    if window.grown(f"{whole}_count", model_name=name):
        return window.quantile(whole, 0.5, model_name=name), window.quantile(
            whole, 0.95, model_name=name
        )
    whole = "mxn_http_request_seconds"
    return window.quantile(whole, 0.5, model=name), window.quantile(whole, 0.95, model=name)


def _tokens(window: Window, name: str, kind: str, live: str) -> float:
    """Return tokens as they leave; of models that are only counted at the end, those that ended."""
    if window.has(live, model_name=name):
        return window.grown(live, model_name=name)
    return window.grown("mxn_tokens_total", model=name, kind=kind)


def _cost(window: Window, **where: str) -> dict[str, int]:
    found = window.by("mxn_cost_micro_total", "currency", **where)
    return {currency: round(60 * micro / window.seconds) for currency, micro in found.items()}


def _replica(window: Window, row: Mapping[str, Any]) -> ReplicaRates:
    made = window.grown("mxn_replica_tokens_total", model=row["model"], replica=row["name"])
    return ReplicaRates(
        model=row["model"],
        replica=row["name"],
        chip=row["chip"],
        state=row["state"],
        running=row["running"],
        waiting=row["waiting"],
        kv_used=row["kv_used"],
        tokens_per_s=made / window.seconds,
        lost=row["lost"],
    )
