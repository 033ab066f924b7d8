"""Counts that cannot be and models paid in several currencies: nothing is lost, and nobody spends
what no budget holds."""

from __future__ import annotations

import asyncio
import logging

import pytest

from mxn.errors import ConfigError, QuotaError, UserError
from mxn.ledger import rollup, statements
from mxn.ledger.balance import check
from mxn.ledger.bounds import MAX_COST_MICRO, MAX_SUM, MAX_TOKENS, bounded
from mxn.ledger.moments import now_us
from mxn.ledger.pricing import Applied, cost
from mxn.ledger.schema import budget_periods, prices
from mxn.ledger.sql_ledger import SqlLedger
from mxn.ledger.types import Settlement
from support.ledgers import complete, count_rows, period_of, row_of, try_open

SILLY = (2**62, 10**23, -(10**23), -1)


def run(database, scenario):
    async def main():
        ledger = SqlLedger(database)
        try:
            return await scenario(ledger)
        finally:
            await ledger.close()

    return asyncio.run(main())


@pytest.mark.parametrize("name", ["input_tokens", "max_output_tokens"])
def test_a_request_of_counts_that_cannot_be_is_refused(database, tenant, name):
    budget = tenant.budget(1000)

    async def scenario(ledger):
        for silly in (*SILLY, MAX_TOKENS + 1):
            with pytest.raises(UserError, match=f"each must be from 0 to {MAX_TOKENS}"):
                await ledger.open(tenant.usage(**{"input_tokens": 1} | {name: silly}))

    run(database, scenario)
    assert count_rows(database) == 0
    assert period_of(database, budget) == (0, 0)


def test_a_settlement_of_silly_counts_is_written_and_the_sums_can_be_read(database, tenant, caplog):
    """Two rows of 2^62 tokens once made a REAL of a budget, and every report failed after."""
    tenant.price("input", 1_000_000)
    tokens, money = tenant.budget(2**62), tenant.budget(2**62, currency="USD")
    names = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "device_us",
             "num_replicas", "status")  # fmt: skip

    async def scenario(ledger):
        for name in names:
            for silly in SILLY:
                ticket = await ledger.open(tenant.usage(0, 0))
                used = Settlement(**{"reason": "complete", "chip": "cpu"} | {name: silly})
                assert (await ledger.settle(ticket, used)).is_new

    with caplog.at_level(logging.ERROR, "mxn.ledger.bounds"):
        run(database, scenario)
    assert len(caplog.records) == len(names) * len(SILLY)
    assert count_rows(database, state="settled") == len(names) * len(SILLY)
    assert period_of(database, tokens) == (0, 4 * MAX_TOKENS)
    assert period_of(database, money) == (0, 2 * MAX_TOKENS)
    assert check(database) == []
    with database.begin() as connection:
        in_three_days = now_us() + 3 * 86_400_000_000
        assert rollup.roll_up(connection, "UTC", now_us=in_three_days)
        assert rollup.summarize(connection)[0]["input_tokens"] == 2 * MAX_TOKENS
        assert statements.statement(connection, since_us=0, until_us=in_three_days, where={})


def test_counts_that_do_not_fit_each_other_are_made_to():
    used = complete(10, 5, cached_tokens=11, reasoning_tokens=6)
    assert bounded("u", used) == complete(10, 5, cached_tokens=10, reasoning_tokens=5)
    fine = complete(10, 5, cached_tokens=10, reasoning_tokens=5)
    assert bounded("u", fine) is fine


def test_a_cost_beyond_what_a_row_holds_is_cut():
    dear = Applied(kind="input", price_id="p", micro_per_million=2**40, currency="USD")
    assert cost({"input": 1_000_000}, {"input": dear}) == 2**40
    assert cost({"input": MAX_TOKENS}, {"input": dear}) == MAX_COST_MICRO


def test_what_a_budget_has_spent_never_leaves_its_type(database, tenant):
    budget = tenant.budget(2**63 - 1)

    async def scenario(ledger):
        for _ in range(2):
            ticket = await ledger.open(tenant.usage(1, 1))
            with database.begin() as connection:
                connection.execute(budget_periods.update().values(spent=MAX_SUM - 5))
            assert (await ledger.settle(ticket, complete(10, 10))).is_new
            assert period_of(database, budget) == (0, MAX_SUM)

    run(database, scenario)


def test_what_may_be_paid_in_two_currencies_needs_and_reserves_both(database, tenant):
    tenant.price("output", 1_000_000, chip="a", currency="USD")
    tenant.price("output", 9_000_000, chip="b", currency="CNY")
    dollars = tenant.budget(1000, currency="USD")

    async def scenario(ledger):
        both = {"chips": ("a", "b")}
        refused = await try_open(ledger, tenant.usage(0, 100, **both))
        assert isinstance(refused, QuotaError)
        assert "is in USD, and this model may be paid in CNY" in str(refused)
        await ledger.settle(await ledger.open(tenant.usage(0, 1, chips=("a",))), complete(0, 0))
        yuan = tenant.budget(1000, currency="CNY")
        await asyncio.to_thread(ledger.cache.refresh)
        ticket = await ledger.open(tenant.usage(0, 100, **both))
        assert (period_of(database, dollars), period_of(database, yuan)) == ((100, 0), (900, 0))
        assert isinstance(await try_open(ledger, tenant.usage(0, 100, **both)), QuotaError)
        await ledger.settle(ticket, complete(0, 100, chip="b"))
        assert (period_of(database, dollars), period_of(database, yuan)) == ((0, 0), (0, 900))
        ticket = await ledger.open(tenant.usage(0, 100, chips=("a",)))  # yuan are not asked
        assert row_of(database, ticket.usage.usage_id).reserved.count("budget_") == 1
        await ledger.settle(ticket, complete(0, 100, chip="a"))
        assert period_of(database, dollars) == (0, 100)

    run(database, scenario)
    assert check(database) == []


def test_a_request_that_may_run_anywhere_reserves_for_every_chip_with_a_price(database, tenant):
    tenant.price("output", 1_000_000, chip="a", currency="USD")
    tenant.price("output", 3_000_000, chip="b", currency="USD")
    budget = tenant.budget(1000, currency="USD")

    async def scenario(ledger):
        ticket = await ledger.open(tenant.usage(0, 100, chips=()))
        assert period_of(database, budget) == (300, 0)
        await ledger.settle(ticket, complete(0, 100, chip="a"))

    run(database, scenario)
    assert period_of(database, budget) == (0, 100)


def mixed(database, tenant):
    """Return a usage whose prices, its own and its base's, are in two currencies."""
    tenant.price("input", 1_000_000, model="base", currency="USD")
    tenant.price("output", 2_000_000, model="ada", currency="EUR")
    return {"model": "ada", "base": "base"}


def test_prices_that_cannot_be_added_refuse_a_request_before_it_runs(database, tenant):
    usage = mixed(database, tenant)

    async def scenario(ledger):
        with pytest.raises(ConfigError, match="EUR and USD"):
            await ledger.open(tenant.usage(10, 10, **usage))

    run(database, scenario)
    assert count_rows(database) == 0


def test_prices_that_stop_adding_up_leave_no_row_open(database, tenant):
    async def scenario(ledger):
        ticket = await ledger.open(tenant.usage(10, 10, model="ada", base="base"))
        mixed(database, tenant)
        with database.begin() as connection:
            connection.execute(prices.update().values(valid_from_us=0))
        await asyncio.to_thread(ledger.cache.refresh)
        receipt = await ledger.settle(ticket, complete(10, 10))
        assert (receipt.cost_micro, receipt.currency) == (10, "USD")

    run(database, scenario)
    assert count_rows(database, state="settled") == 1
