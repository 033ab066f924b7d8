"""Greedy streams are the same with and without the death of their replica, and nothing is left."""

from __future__ import annotations

import pytest

from chaos.failover import Plan, run_failover
from chaos.verdict import Report


def check(report: Report, *, lost: int) -> None:
    assert report.problems == []
    assert report.calm_unequal == 0
    assert report.spared_bad == 0
    assert report.lost >= lost
    assert report.moved > 0
    assert report.finished == report.identical == report.lost


def test_a_killed_server_ends_no_stream(tmp_path):
    plan = Plan(
        streams=8, replicas=2, seed=21, num_questions=12, at_once=16, stall_limit_s=0.5,
        num_alone=2,
    )  # fmt: skip
    check(run_failover(tmp_path, plan), lost=8)


@pytest.mark.slow
@pytest.mark.parametrize("is_local", [False, True])
def test_hundreds_of_lost_replicas_change_nothing(tmp_path, is_local):
    plan = Plan(streams=300, replicas=3, seed=1, is_local=is_local)
    check(run_failover(tmp_path, plan), lost=300)
