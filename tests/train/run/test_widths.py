"""Which widths of tensor parallelism a job's planner has measured."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from mxn.train.plan.cluster import Cluster, DeviceGroup, Link
from mxn.train.plan.memory import FLOAT32
from mxn.train.plan.profile import ChipProfile, LayerCost
from mxn.train.plan.search import planner
from mxn.train.plan.search.choices import Limits
from mxn.train.run.from_job import open_source
from mxn.train.run.job_file import read_job
from mxn.train.run.measure import Measured
from mxn.train.run.widths import dividing_widths, promising_widths, with_derived
from mxn.train.shapes import model_shape

FRAMEWORK = 100_000_000
LIMITS = Limits(micro_batches=(1,), tps=(1,), max_stages=1, may_shard_optimizer=False)


@pytest.fixture
def job(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be.\n" * 50)
    (tmp_path / "job.yaml").write_text(
        "model: mxn-shakespeare-llama\ndata: {files: [text.txt]}\n"
        "seq_tokens: 32\nmicro_batch: 1\nglobal_batch: 4\nsteps: 2\n"
        "devices: [{name: a, device: cpu, count: 2}]\n"
    )
    return read_job(tmp_path / "job.yaml", out=Path(tmp_path) / "run")


def measured(job, *, memory_bytes: int) -> Measured:
    shape = model_shape(open_source(job).spec, name="tiny", seq_tokens=32)
    link = Link(latency_s=1e-4, bytes_per_s=1e9, basis="measured")
    group = DeviceGroup(
        name="a", chip="x", num_devices=2, devices_per_node=2, memory_bytes=memory_bytes,
        node_link=link, group_link=link,
    )  # fmt: skip
    cost = LayerCost(forward_s=0.01, backward_s=0.02, optimizer_s=0.001, weight_s=0.01)
    costs = dict.fromkeys(product({layer.kind for layer in shape.layers}, [1], [1]), cost)
    profile = ChipProfile(chip="x", costs=costs, framework_bytes=FRAMEWORK)
    return Measured(
        shape=shape, cluster=Cluster(groups=(group,)), profiles={"x": profile}, stored={},
        links={}, memory=FLOAT32, is_reused=True,
    )  # fmt: skip


def test_a_width_must_divide_heads_and_columns(job):
    source = open_source(job)
    heads = source.spec.layers[0].attention
    widths = dividing_widths(source, 16)
    assert 2 in widths
    assert all(heads.num_kv_heads % w == 0 and heads.num_heads % w == 0 for w in widths)
    assert heads.num_kv_heads * 2 not in widths
    assert dividing_widths(source, 1) == ()


def test_wider_blocks_are_derived_and_say_so(job):
    found = measured(job, memory_bytes=10**9)
    wide = with_derived(found.profiles["x"], found.shape, found.cluster, (2,))
    one, two = wide.layer("block", 1, 1), wide.layer("block", 1, 2)
    assert one.forward_s / 2 < two.forward_s < one.forward_s  # the sums are on top
    assert wide.layer("head", 1, 2) == wide.layer("head", 1, 1)  # whole on each device
    assert wide.basis == "derived"
    assert with_derived(
        replace(found.profiles["x"], basis="simulated"), found.shape, found.cluster, (2,)
    ).basis == "simulated"  # fmt: skip


def test_a_width_is_measured_where_one_device_is_too_small(job):
    """One stage only, and the whole model does not fit on a device."""
    held = measured(job, memory_bytes=1).shape.params * FLOAT32.state_bytes
    found = measured(job, memory_bytes=int(FRAMEWORK + 0.85 * held))
    assert promising_widths(job, found, LIMITS) == (2,)


def test_where_no_width_makes_a_job_fit_none_is_measured(job, monkeypatch):
    """The error is the planner's to make, later."""
    monkeypatch.setattr(planner, "nearest", None)
    assert promising_widths(job, measured(job, memory_bytes=FRAMEWORK + 1), LIMITS) == ()


def test_no_width_is_measured_where_two_pipelines_do_as_well(job):
    fine = measured(job, memory_bytes=10**9)
    assert promising_widths(job, fine, replace(LIMITS, max_stages=None)) == ()
    slow = Link(latency_s=1.0, bytes_per_s=1e9)
    groups = tuple(replace(g, node_link=slow, group_link=slow) for g in fine.cluster.groups)
    assert promising_widths(job, replace(fine, cluster=Cluster(groups=groups)), LIMITS) == ()
