"""The tables that cuts are made from say what the predictor says of the same stage."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mxn.train.plan.cluster import Cluster, DeviceGroup, Link
from mxn.train.plan.memory import FLOAT32, MIXED, MemoryModel
from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.plan.predict import predict
from mxn.train.plan.profile import ChipProfile, LayerCost
from mxn.train.plan.search.columns import Job, Kind
from mxn.train.plan.search.tables import TableBook
from mxn.train.plan.shape import LayerShape, ModelShape

LINK = Link(latency_s=0.0, bytes_per_s=1e9)


@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("memory", [MemoryModel(), FLOAT32, MIXED], ids=["usual", "f32", "mixed"])
@pytest.mark.parametrize("num_pipelines", [1, 2, 3])
def test_bytes_of_every_run_are_the_predictors(num_pipelines, memory, is_tied, how):
    rows = [("embedding", 500, 0.0), *[("block", 300, 40.0)] * 3, ("head", 510, 90.0)]
    shape = ModelShape(
        name="toy", seq_tokens=4, is_tied=is_tied,
        layers=tuple(
            LayerShape(kind=kind, params=params, forward_flop=900.0, activation_bytes=kept,
                       core_bytes=kept / 4, output_bytes=8.0)
            for kind, params, kept in rows
        ),
    )  # fmt: skip
    costs = {
        (kind, 1, 1): LayerCost(forward_s=s, backward_s=2 * s, optimizer_s=s / 10)
        for kind, s in (("embedding", 0.1), ("block", 1.0), ("head", 0.7))
    }
    profiles = {
        "a": ChipProfile(chip="a", costs=costs, framework_bytes=77.0),
        "wider": ChipProfile(chip="wider", costs=costs, width=2.0),  # and may be a neighbour
    }
    group = DeviceGroup(
        name="a", chip="a", num_devices=12, devices_per_node=12, memory_bytes=10**6,
        node_link=LINK, group_link=LINK,
    )  # fmt: skip
    cluster = Cluster(groups=(group,))
    job = Job(shape=shape, cluster=cluster, profiles=profiles, memory=memory)
    tables = TableBook(job).at(1, num_pipelines)
    for bounds in ((0, 5), (0, 1, 5), (0, 2, 5), (0, 1, 4, 5), (0, 3, 4, 5)):
        plan = TrainPlan(
            model="toy", num_layers=5, seq_tokens=4, micro_batch=1,
            shards_optimizer=num_pipelines > 1,
            pipelines=tuple(Pipeline(
                stages=tuple(
                    Stage(group="a", first_device=4 * p + s, recompute=how,
                          chunks=(Chunk(first=first, end=end),))
                    for s, (first, end) in enumerate(pairwise(bounds))
                ),
                micro_batches=2,
            ) for p in range(num_pipelines)),
        )  # fmt: skip
        told = predict(plan, shape, cluster, profiles, memory=memory).stages
        for s, (first, end) in enumerate(pairwise(bounds)):
            kept = min(2, len(bounds) - 1 - s)
            assert tables.bytes(Kind("a", 1), how, kept)[first, end] == pytest.approx(
                told[s].memory_bytes
            )
