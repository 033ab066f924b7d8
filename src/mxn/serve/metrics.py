"""Prometheus metrics of a server: requests, tokens, latencies and KV pages, by model.

Names follow vLLM's stems with the prefix `mxn_`, so that existing dashboards need one replacement.
Counts come from what left this server; gauges are read from the replicas at scrape time.
"""

from __future__ import annotations

import time
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mxn.engine.protocol import Delta, EngineStats
from mxn.serve.replica_status import ReplicaFamilies

Outcome = Literal["stop", "length", "client_gone", "error"]

_FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


# Totals that the engine keeps: counter here, field of its stats, what it counts.
_ENGINE_TOTALS = (
    (
        "num_preemptions",
        "preemptions_total",
        "Requests that lost their pages and were recomputed",
    ),
    (
        "spec_decode_num_drafts",
        "drafts_total",
        "Times that a request carried guessed tokens in a step",
    ),
    ("spec_decode_num_draft_tokens", "draft_tokens_total", "Guessed tokens"),
    (
        "spec_decode_num_accepted_tokens",
        "accepted_draft_tokens_total",
        "Guessed tokens that came true",
    ),
    (
        "spec_decode_num_undrafted_requests",
        "undrafted_requests_total",
        "Requests with a grammar, which run without guessed tokens",
    ),
)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.replicas = ReplicaFamilies()
        self.registry.register(self.replicas)
        self._by_model: dict[str, ModelMetrics] = {}
        self._counters = {
            name: Counter(f"mxn_{name}", text, ["model_name"], registry=self.registry)
            for name, text in (
                ("prompt_tokens", "Prompt tokens of answered requests"),
                ("cached_prompt_tokens", "Prompt tokens found in the prefix cache"),
                ("generation_tokens", "Generated tokens that left the server"),
                *((name, text) for name, _, text in _ENGINE_TOTALS),
            )
        }
        self._outcomes = Counter(
            "mxn_request_success",
            "Finished requests by reason: stop, length, client_gone, error",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._gauges = {
            name: Gauge(f"mxn_{name}", text, ["model_name"], registry=self.registry)
            for name, text in (
                ("num_requests_running", "Requests in the current batch"),
                ("num_requests_waiting", "Requests that wait for a place in the batch"),
                ("kv_pages_total", "KV pages of the replica"),
                ("kv_pages_used", "KV pages that sequences hold"),
                ("kv_cache_usage_perc", "Used share of the KV pages, 0 to 1"),
                ("engine_up", "1 while the replica answers"),
            )
        }
        self._histograms = {
            name: Histogram(
                f"mxn_{name}", text, ["model_name"], buckets=buckets, registry=self.registry
            )
            for name, text, buckets in (
                ("time_to_first_token_seconds", "Arrival to first token", _FIRST_TOKEN_S),
                ("inter_token_latency_seconds", "Time between tokens", _BETWEEN_TOKENS_S),
                ("e2e_request_latency_seconds", "Arrival to last token", _WHOLE_S),
            )
        }

    def model(self, name: str) -> ModelMetrics:
        """Return the metrics of one model, with label lookups done once."""
        if name not in self._by_model:
            self._by_model[name] = ModelMetrics(self, name)
        return self._by_model[name]

    def set_gauges(self, name: str, stats: EngineStats | None) -> None:
        """Copy a replica's state; None means that it did not answer."""
        self._gauges["engine_up"].labels(name).set(0 if stats is None else 1)
        if stats is None:
            return
        used = stats.kv_pages_used / stats.kv_pages_total if stats.kv_pages_total else 0.0
        for gauge, value in (
            ("num_requests_running", stats.num_running),
            ("num_requests_waiting", stats.num_waiting),
            ("kv_pages_total", stats.kv_pages_total),
            ("kv_pages_used", stats.kv_pages_used),
            ("kv_cache_usage_perc", used),
        ):
            self._gauges[gauge].labels(name).set(value)
        self.model(name).set_totals(stats)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class ModelMetrics:
    """The labelled children of one model."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self.prompt_tokens = metrics._counters["prompt_tokens"].labels(name)
        self.cached_tokens = metrics._counters["cached_prompt_tokens"].labels(name)
        self.generation_tokens = metrics._counters["generation_tokens"].labels(name)
        self.first_token = metrics._histograms["time_to_first_token_seconds"].labels(name)
        self.between_tokens = metrics._histograms["inter_token_latency_seconds"].labels(name)
        self.whole = metrics._histograms["e2e_request_latency_seconds"].labels(name)
        self._outcomes = metrics._outcomes
        self._totals = {
            field: metrics._counters[counter].labels(name) for counter, field, _ in _ENGINE_TOTALS
        }
        self._totals_seen = dict.fromkeys(self._totals, 0)
        self._name = name

    def finished(self, outcome: Outcome) -> None:
        self._outcomes.labels(self._name, outcome).inc()

    def set_totals(self, stats: EngineStats) -> None:
        """Add what the engine has counted since the last time."""
        for field, counter in self._totals.items():
            total, seen = getattr(stats, field), self._totals_seen[field]
            # A restarted replica counts from zero again; what it has counted since is new.
            counter.inc(total - seen if total >= seen else total)
            self._totals_seen[field] = total


class Trace:
    """Times and counts of one engine request, from arrival to its end."""

    __slots__ = ("_arrived_s", "_last_s", "_metrics", "cached_tokens", "completion_tokens", "done",
                 "prompt_tokens")  # fmt: skip

    def __init__(self, metrics: ModelMetrics) -> None:
        self._metrics = metrics
        self._arrived_s = time.perf_counter()
        self._last_s = 0.0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.done = False

    def on_delta(self, delta: Delta) -> None:
        now = time.perf_counter()
        if delta.token_ids:
            if self._last_s:
                self._metrics.between_tokens.observe((now - self._last_s) / len(delta.token_ids))
            else:
                self._metrics.first_token.observe(now - self._arrived_s)
            self._last_s = now
        if delta.prompt_tokens > self.prompt_tokens:
            self._metrics.prompt_tokens.inc(delta.prompt_tokens - self.prompt_tokens)
            self.prompt_tokens = delta.prompt_tokens
        if delta.cached_tokens > self.cached_tokens:
            self._metrics.cached_tokens.inc(delta.cached_tokens - self.cached_tokens)
            self.cached_tokens = delta.cached_tokens
        # At once, not at the end: a rate over seconds must see answers that take minutes.
        if delta.completion_tokens > self.completion_tokens:
            self._metrics.generation_tokens.inc(delta.completion_tokens - self.completion_tokens)
            self.completion_tokens = delta.completion_tokens
        if delta.finish_reason == "stop" or delta.finish_reason == "length":
            self.close(delta.finish_reason)

    def close(self, outcome: Outcome) -> None:
        """Count the request once, whatever ends it first."""
        if self.done:
            return
        self.done = True
        self._metrics.whole.observe(time.perf_counter() - self._arrived_s)
        self._metrics.finished(outcome)
