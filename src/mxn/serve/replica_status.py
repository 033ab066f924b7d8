"""What operators see of each replica, and its Prometheus families.

Knows neither pools nor HTTP; `status.py` fills the rows when somebody asks. Start at
`ReplicaStatus`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

# `failing`: it failed several times in a row and is left alone; `held`: it came back, and has to
# stay well for a while before it gets requests.
ReplicaState = Literal["up", "draining", "down", "failing", "held"]

_LABELS = ("model", "replica", "chip")


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One replica now. None: its server does not say. `tokens` and `lost` count from our start."""

    model: str
    name: str
    chip: str
    state: ReplicaState
    running: int  # requests, ours and those of others
    waiting: int | None
    kv_used: float | None  # share of its KV pages, 0 to 1
    tokens: int  # it made for requests of ours
    lost: int  # requests that had to go on from another one


class ReplicaFamilies(Collector):
    """The rows of the last look, as metrics: a replica that left takes its series along."""

    def __init__(self) -> None:
        self.rows: Sequence[ReplicaStatus] = ()
        self.queued: Mapping[str, int] = {}  # model → requests that wait for any replica

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("mxn_replica_up", "1 while it takes requests", labels=_LABELS)
        running = GaugeMetricFamily(
            "mxn_replica_requests_running", "Requests in its batch", labels=_LABELS
        )
        waiting = GaugeMetricFamily(
            "mxn_replica_requests_waiting", "Requests that wait inside it", labels=_LABELS
        )
        kv = GaugeMetricFamily(
            "mxn_replica_kv_cache_usage_perc", "Used share of its KV pages, 0 to 1", labels=_LABELS
        )
        tokens = CounterMetricFamily(
            "mxn_replica_tokens", "Tokens that it made for us", labels=_LABELS
        )
        lost = CounterMetricFamily(
            "mxn_replica_requests_lost", "Requests that went on from another one", labels=_LABELS
        )
        for row in self.rows:
            labels = (row.model, row.name, row.chip)
            up.add_metric(labels, row.state == "up")
            running.add_metric(labels, row.running)
            if row.waiting is not None:
                waiting.add_metric(labels, row.waiting)
            if row.kv_used is not None:
                kv.add_metric(labels, row.kv_used)
            tokens.add_metric(labels, row.tokens)
            lost.add_metric(labels, row.lost)
        yield from (up, running, waiting, kv, tokens, lost)
        queue = GaugeMetricFamily(
            "mxn_queue_waiting", "Requests that wait until a replica has room", labels=("model",)
        )
        for model, count in self.queued.items():
            queue.add_metric((model,), count)
        yield queue
