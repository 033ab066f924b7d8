"""Ranks on a Ray cluster of this machine. Skips where ray is not installed (extra `cluster`)."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mxn.errors import CapacityError
from mxn.train.run import launch_ray
from mxn.train.run.control import Control
from mxn.train.run.job import FaultSettings, GateSettings, metrics_path
from mxn.train.run.launch import launching_of
from mxn.train.run.launch_ray import bundle_of, launch_on_ray, unplaced
from mxn.train.run.session import run_job
from mxn.train.run.supervise.needs import NoPlaceError
from mxn.train.run.track import read_metrics
from support.launches import group, on_one_device, small_job
from support.parity_cases import plan_of

TWO_STAGES = plan_of((8, [[(0, 3)], [(3, 6)]]))


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_devices_become_what_ray_reserves():
    assert bundle_of(group(threads=2)) == {"CPU": 2.0}
    assert bundle_of(group(cpu_share=0.5)) == {"CPU": 0.5}
    assert bundle_of(group(device="cuda:3")) == {"CPU": 1.0, "GPU": 1.0}
    assert bundle_of(group(device="npu:1")) == {"CPU": 1.0, "NPU": 1.0}


ONE_GPU, CPUS = {"CPU": 1.0, "GPU": 1.0}, {"CPU": 2.0}
MACHINE = {"CPU": 4.0, "GPU": 1.0, "memory": 1e9}


def test_the_first_rank_without_a_place_is_found():
    bundles = [CPUS, ONE_GPU, ONE_GPU]
    assert unplaced(bundles, [MACHINE, MACHINE], {"CPU": 8.0, "GPU": 2.0}) is None
    assert unplaced(bundles, [MACHINE], MACHINE) == 2  # the other machine is gone
    assert unplaced(bundles, [MACHINE, MACHINE], {"CPU": 8.0, "GPU": 1.0}) == 2  # or busy
    assert unplaced([CPUS], [{"CPU": 1.0}] * 4, {"CPU": 4.0}) == 0  # in pieces too small
    assert unplaced([CPUS], [], {}) == 0
    # The first machine is the only one with a GPU, so the rank without one goes elsewhere.
    many = {"CPU": 8.0}
    free = {"CPU": 12.0, "GPU": 1.0}
    assert unplaced([{"CPU": 4.0}, ONE_GPU, {"CPU": 6.0}], [MACHINE, many], free) == 2


def test_the_group_that_lost_its_machine_is_named(monkeypatch):
    removed: list[object] = []
    full = SimpleNamespace(wait=lambda _: False)
    util = SimpleNamespace(
        placement_group=lambda *_, **__: full, remove_placement_group=removed.append
    )  # fmt: skip
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": False, "Resources": MACHINE}]
    fake = SimpleNamespace(
        util=util, nodes=lambda: nodes, available_resources=lambda: {"CPU": 8.0}
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.util", util)
    with pytest.raises(NoPlaceError, match=r"none for rank 1 \(group 'b'\)") as caught:
        launch_ray._reserve(["a", "b"], [CPUS, ONE_GPU])
    assert caught.value.group == "b"
    assert removed == [full]


@pytest.mark.slow
def test_ranks_on_ray_train_as_ranks_here(ray, tmp_path):
    job = small_job(tmp_path, 5, [group(count=2)])
    ranks = launch_on_ray(launching_of(job, TWO_STAGES))
    try:
        ranks.wait(200)
    finally:
        ranks.kill()
    assert Control(tmp_path, 0).is_finished()
    got = [line["loss"] for line in read_metrics(metrics_path(job))]
    assert got == pytest.approx(on_one_device(job), rel=2e-5)
    assert ray.available_resources()["CPU"] == 3


@pytest.mark.slow
def test_a_rank_killed_on_ray_is_noticed(ray, tmp_path):
    job = small_job(tmp_path, 100_000, [group(count=2)])
    ranks = launch_on_ray(launching_of(job, TWO_STAGES))
    try:
        deadline = time.monotonic() + 200
        while not Path(metrics_path(job)).is_file():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(ranks.pids()[1], signal.SIGKILL)
        while not ranks.deaths():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert (1, -signal.SIGKILL) in {(death.rank, death.code) for death in ranks.deaths()}
    finally:
        ranks.kill()
    assert ranks.have_ended()


@pytest.mark.slow
def test_why_a_rank_did_not_start_on_its_machine_is_told(ray, tmp_path):
    """It was a rank without a place, and the reason was that of nobody."""
    job = small_job(tmp_path, 1, [group(count=2, cpu_share=1000.0)])
    with pytest.raises(CapacityError, match="a CPU share must be") as caught:
        launch_on_ray(launching_of(job, TWO_STAGES))
    assert not isinstance(caught.value, NoPlaceError)


@pytest.mark.slow
def test_a_cluster_that_is_too_small_is_told(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(launch_ray, "_RESERVE_S", 1.0)
    job = small_job(tmp_path, 1, [group(count=2, threads=2)])
    with pytest.raises(CapacityError, match="cannot hold 2 ranks"):
        launch_on_ray(launching_of(job, TWO_STAGES))


@pytest.fixture
def machines(tmp_path_factory, monkeypatch) -> Iterator[Any]:
    """A Ray cluster of two machines with a processor for one rank each, both on this one."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    ray.shutdown()
    monkeypatch.setenv("MXN_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setattr(launch_ray, "_RESERVE_S", 10.0)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.second = cluster.add_node(num_cpus=1)  # type: ignore[attr-defined]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_machine_that_leaves_the_cluster_takes_its_group_with_it(machines, tmp_path):
    """The job goes on from its checkpoint with the other group, on the same data."""
    job = small_job(
        tmp_path, 100, [group("a"), group("b")], gate=GateSettings(speed="ignore"),
        faults=FaultSettings(drop_after=2, grow=False),
    )  # fmt: skip
    seen: list[int] = []

    def leave() -> None:
        end = time.monotonic() + 200
        while len(read_metrics(metrics_path(job))) < 5 and time.monotonic() < end:
            time.sleep(0.02)
        seen.append(len(read_metrics(metrics_path(job))))
        machines.remove_node(machines.second, allow_graceful=False)

    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    state = run_job(job, ray=machines.address)
    thread.join()
    assert state.phase == "done"
    assert 5 <= seen[0] < 100
    assert len(state.dropped) == 1
    got = [line["loss"] for line in read_metrics(metrics_path(job))]
    assert got == pytest.approx(on_one_device(job), rel=2e-5)
