"""On what a pool's compute is spent while a plan runs. Start at `shares_of`.

Each device is weighed by its compute rate (U' of `bounds`), so the model's own work is R' and the
losses are what is missing to 1.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from mxn.train.plan.bounds import Bounds
from mxn.train.plan.cluster import Cluster, Link
from mxn.train.plan.costs import CostBook
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.plan import Chunk, TrainPlan
from mxn.train.plan.predict import predict
from mxn.train.plan.prediction import Prediction
from mxn.train.plan.profile import Profiles
from mxn.train.plan.search.choices import Candidate
from mxn.train.plan.shape import ModelShape

FREE = "free"
WORDS = {
    "useful": "the model's work, at each chip's best rate",
    "kernels": "slower kernels: this micro-batch and width against the chip's best",
    "recompute": "activations computed again",
    "fill": "filling and draining the pipelines, and whole micro-batches",
    "uneven": "stages that wait for a slower one: whole layers and memory limits",
    "links": "activations on their way between stages",
    "reduce": "sums of gradients",
    "optimizer": "the optimizer",
    "idle": "devices that the plan leaves out",
    "other": "layers that suit one chip better than another",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What the predictor needs beside a plan."""

    shape: ModelShape
    cluster: Cluster
    profiles: Profiles
    memory: MemoryModel

    def predict(self, plan: TrainPlan, cluster: Cluster | None = None) -> Prediction:
        return predict(plan, self.shape, cluster or self.cluster, self.profiles, memory=self.memory)


def shares_of(best: Candidate, asked: Asked, bounds: Bounds) -> dict[str, float]:
    """Return on what the pool's compute is spent, each device weighed by its compute rate."""
    plan, seen = best.plan, best.prediction
    rates = {group.group: group.compute for group in bounds.groups}
    free_s = asked.predict(plan, with_links(asked.cluster, FREE)).pipeline_s
    links_s = max(0.0, asked.predict(plan).pipeline_s - free_s)
    slowest: dict[int, float] = defaultdict(float)
    for stage in seen.stages:
        slowest[stage.pipeline] = max(slowest[stage.pipeline], stage.busy_s)
    book = CostBook(asked.shape, asked.profiles, plan.micro_batch)
    spent: dict[str, float] = dict.fromkeys(WORDS, 0.0)
    used = 0.0
    for at in seen.stages:
        pipeline = plan.pipelines[at.pipeline]
        stage = pipeline.stages[at.stage]
        chip = asked.cluster.group(stage.group).chip
        weight = stage.tp * rates[stage.group]
        used += weight
        plain_s = book.stage(chip, replace(stage, recompute="none")).busy_s * pipeline.micro_batches
        whole_s = book.stage(
            chip,
            replace(stage, recompute="none", chunks=_whole(stage.chunks, plan.num_layers)),
        ).busy_s
        best_rate = plan.micro_batch * plan.seq_tokens / (whole_s * stage.tp) / rates[stage.group]
        rest_s = seen.pipeline_s - slowest[at.pipeline]
        spent["useful"] += weight * plain_s * best_rate
        spent["kernels"] += weight * plain_s * (1 - best_rate)
        spent["recompute"] += weight * max(at.busy_s - plain_s, 0.0)
        spent["uneven"] += weight * (slowest[at.pipeline] - at.busy_s)
        spent["links"] += weight * min(links_s, rest_s)
        spent["fill"] += weight * (rest_s - min(links_s, rest_s))
    pool = bounds.compute_tokens_per_s
    spent["reduce"] = used * seen.reduce_s
    spent["optimizer"] = used * seen.optimizer_s
    spent["idle"] = (pool - used) * seen.iteration_s
    spent["other"] = pool * seen.iteration_s - sum(spent.values())
    return {name: value / (pool * seen.iteration_s) for name, value in spent.items()}


def _whole(chunks: tuple[Chunk, ...], num_layers: int) -> tuple[Chunk, ...]:
    return (replace(chunks[0], first=0, end=num_layers),)


def with_links(cluster: Cluster, which: str) -> Cluster:
    """Return the cluster with some links faster, or all of them free."""

    def faster(link: Link) -> Link:
        factor = 1e9 if which == FREE else 10.0
        points = tuple((size, seconds / factor) for size, seconds in link.points)
        return replace(
            link, latency_s=link.latency_s / factor, bytes_per_s=link.bytes_per_s * factor,
            points=points,
        )  # fmt: skip

    groups, links = cluster.groups, cluster.links
    if which in ("inside", FREE):
        groups = tuple(
            replace(g, node_link=faster(g.node_link), group_link=faster(g.group_link))
            for g in groups
        )
    if which in ("between", FREE):
        links = {pair: faster(link) for pair, link in links.items()}
    return Cluster(groups=groups, links=links)
