"""Limited links by the clock they are given, CPU shares by the files they write, placements."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mxn.errors import CapacityError, UnsupportedError, UserError
from mxn.train.run.cpu_share import CpuShare
from mxn.train.run.link_limit import LinkLimit, TokenBucket
from mxn.train.run.placement import Placement
from support.parity_cases import plan_of


def test_messages_share_a_limited_link_and_latency_does_not_occupy_it():
    bucket = TokenBucket(LinkLimit(bytes_per_s=100.0, latency_s=2.0))
    assert bucket.arrival_s(50, now_s=10.0) == pytest.approx(12.5)
    assert bucket.arrival_s(50, now_s=10.0) == pytest.approx(13.0)
    assert bucket.arrival_s(10, now_s=20.0) == pytest.approx(22.1)


@pytest.mark.parametrize("values", [{"bytes_per_s": 0.0}, {"latency_s": -1.0}])
def test_an_impossible_limit_is_refused(values):
    with pytest.raises(UserError, match="link limit"):
        LinkLimit(**values)


def test_a_share_of_cgroup_1_is_quota_and_period(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cgroup.procs").write_text("")
    share = CpuShare.create(0.25, "rank-0", root=tmp_path)
    assert share.folder.parent == tmp_path / "cpu"
    assert (share.folder / "cpu.cfs_period_us").read_text() == "20000"
    assert (share.folder / "cpu.cfs_quota_us").read_text() == "5000"
    share.take_in(17)
    assert (share.folder / "cgroup.procs").read_text() == "17"


def test_a_share_of_cgroup_2_is_cpu_max(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io")
    (tmp_path / "cgroup.subtree_control").write_text("")
    share = CpuShare.create(0.5, "rank-0", root=tmp_path)
    assert (share.folder / "cpu.max").read_text() == "10000 20000"
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu"


def test_without_a_controller_the_error_says_what_is_missing(tmp_path):
    with pytest.raises(UnsupportedError, match="no cgroup with the cpu controller"):
        CpuShare.create(0.5, "rank-0", root=tmp_path)


def test_a_controller_that_may_not_be_written_is_told(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("cpu")
    (tmp_path / "cgroup.subtree_control").mkdir()  # reading and writing it fails, also for root
    with pytest.raises(UnsupportedError, match="cannot limit a rank's CPU share"):
        CpuShare.create(0.5, "rank-0", root=tmp_path)


@pytest.mark.parametrize("share", [0.001, 1e6])
def test_shares_that_no_machine_has_are_refused(share, tmp_path):
    with pytest.raises(CapacityError, match="CPU share"):
        CpuShare.create(share, "rank-0", root=tmp_path)


def test_ranks_and_holders_follow_the_plan():
    plan = plan_of(
        (5, [[(0, 2), (3, 4)], [(2, 3), (4, 6)]]),
        (3, [[(0, 3), (4, 5)], [(3, 4), (5, 6)]]),
        schedule="interleaved",
    )
    placement = Placement(plan)
    assert placement.num_ranks == 4
    assert placement.holders() == {0: [0, 2], 1: [0, 2], 2: [1, 2], 3: [0, 3], 4: [1, 2], 5: [1, 3]}
    assert [placement.rank_of_part(1, part) for part in range(4)] == [2, 3, 2, 3]
    assert placement.first_micro_batch(1) == 5
    assert list(placement.channels())[:3] == [(0, 1, "F0"), (1, 0, "B0"), (1, 0, "F1")]


def test_expert_parallel_plans_are_refused_by_name():
    plan = replace(plan_of((1, [[(0, 6)]])), expert_parallel=2)
    with pytest.raises(UnsupportedError, match="expert_parallel 2 can be predicted and not yet"):
        Placement(plan)
