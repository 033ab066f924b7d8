"""The books balance and nothing is lost, whatever is killed. Each test really kills processes."""

from __future__ import annotations

import pytest

from chaos.chaos import run_chaos
from support.postgres import Postgres, find_binaries


def check(result, *, requests):
    verdict = result.verdict
    assert verdict.problems == []
    assert verdict.counts["finished"] > requests / 4
    assert sum(verdict.counts.values()) == requests
    assert sum(result.kills.values()) > 0


def test_a_pool_under_fire_keeps_its_books(tmp_path):
    result = run_chaos(
        tmp_path, f"sqlite:///{tmp_path}/ledger.db", requests=120, replicas=2, seed=3,
        pause_s=(0.3, 0.8),
    )  # fmt: skip
    check(result, requests=120)


@pytest.mark.slow
@pytest.mark.parametrize("gateways", [1, 2])
def test_ten_thousand_requests_on_sqlite(tmp_path, gateways):
    url = f"sqlite:///{tmp_path}/ledger.db"
    result = run_chaos(tmp_path, url, requests=10_000, gateways=gateways, seed=gateways)
    check(result, requests=10_000)


@pytest.mark.slow
@pytest.mark.parametrize("gateways", [1, 2])
def test_ten_thousand_requests_on_postgresql(tmp_path, gateways):
    if find_binaries() is None:
        pytest.skip("no initdb: install PostgreSQL to run this")
    postgres = Postgres(is_fast=False)
    postgres.start()
    try:
        result = run_chaos(
            tmp_path, postgres.url, requests=10_000, gateways=gateways, seed=gateways,
            postgres=postgres,
        )  # fmt: skip
    finally:
        postgres.remove()
    check(result, requests=10_000)
