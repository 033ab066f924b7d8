"""Small models, clusters and plans with round numbers, for tests of planning and simulation."""

from __future__ import annotations

import itertools

from mxn.train.plan.cluster import Cluster, DeviceGroup, Link
from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.plan.profile import ChipProfile, LayerCost
from mxn.train.plan.shape import LayerShape, ModelShape

SEQ_TOKENS = 8


def _layer(kind):
    return LayerShape(
        kind=kind, params=1000, forward_flop=2000.0, activation_bytes=100.0, output_bytes=10.0
    )


def shape(num_blocks, is_tied=False):
    layers = [_layer("embedding"), *[_layer("block")] * num_blocks, _layer("head")]
    return ModelShape(name="tiny", layers=tuple(layers), seq_tokens=SEQ_TOKENS, is_tied=is_tied)


def _profile(chip, seconds):
    cost = LayerCost(forward_s=seconds, backward_s=2 * seconds, optimizer_s=0.01, weight_s=seconds)
    kinds = ("embedding", "block", "head")
    return ChipProfile(chip=chip, costs={(kind, 1, tp): cost for kind in kinds for tp in (1, 2, 8)})


PROFILES = {"fast": _profile("fast", 0.1), "slow": _profile("slow", 0.2)}
_FREE = Link(latency_s=0.0, bytes_per_s=1e15)


def _group(name, chip, num_devices=64, link=_FREE):
    return DeviceGroup(
        name=name,
        chip=chip,
        num_devices=num_devices,
        devices_per_node=8,
        memory_bytes=10**9,
        node_link=link,
        group_link=link,
        peak_flop_per_s=1e6,
        watts=100.0,
        price_micro_per_hour=3_600_000,
    )


def cluster(between=_FREE, link=_FREE, num_devices=64):
    groups = (
        _group("a", "fast", num_devices, link),
        _group("b", "slow", num_devices, link),
    )
    return Cluster(groups=groups, links={("a", "b"): between})


def pipeline(cuts, groups, batches, first_device=0, tp=1):
    """`cuts` are the ends of the parts; chunk by chunk when there are more parts than groups."""
    bounds = [0, *cuts]
    parts = [Chunk(first=a, end=b) for a, b in itertools.pairwise(bounds)]
    size = len(groups)
    stages = tuple(
        Stage(group=group, first_device=first_device + s * tp, chunks=tuple(parts[s::size]), tp=tp)
        for s, group in enumerate(groups)
    )
    return Pipeline(stages=stages, micro_batches=batches)


def plan(*pipelines, schedule="1f1b", num_layers=8):
    return TrainPlan(
        model="tiny",
        num_layers=num_layers,
        seq_tokens=SEQ_TOKENS,
        micro_batch=1,
        pipelines=pipelines,
        schedule=schedule,
    )
