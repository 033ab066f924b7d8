"""The promises of `types.Ledger`, on real databases."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest
from sqlalchemy import update

from mxn.errors import AuthError, InternalError, QuotaError, RateLimitError
from mxn.ledger import keys, pricing, schema, tenants
from mxn.ledger.balance import check
from mxn.ledger.compose import compose_opening
from mxn.ledger.moments import now_us
from mxn.ledger.periods import Periods
from mxn.ledger.rules import Rules
from mxn.ledger.sql_ledger import SqlLedger
from mxn.ledger.types import Settlement, Ticket
from support.ledgers import complete, count_rows, open_many, period_of, row_of


@pytest.fixture
def still():
    """A clock that stands, so that no minute ends within a test of limits."""
    at_us = now_us()
    return lambda: at_us


@pytest.fixture(params=["inline", "thread"])
def run(request, database):
    """Run `scenario(ledger)` on an event loop, then close the ledger and check the books."""
    if request.param == "inline" and not database.is_sqlite:
        pytest.skip("PostgreSQL is always written to from a thread")

    def runner(scenario, **options):
        async def main():
            ledger = SqlLedger(database, mode=request.param, **options)
            try:
                return await scenario(ledger)
            finally:
                await ledger.close()

        result = asyncio.run(main())
        assert check(database) == []
        return result

    return runner


def test_a_row_is_there_when_open_returns_and_settled_once(run, database, tenant):
    tenant.price("input", 1_000_000)
    tenant.price("output", 2_000_000)
    budget = tenant.budget(1000)

    async def scenario(ledger):
        ticket = await ledger.open(tenant.usage(10, 20))
        row = row_of(database, ticket.usage.usage_id)
        assert (row.state, row.gateway_id, row.chip) == ("open", ledger.gateway_id, "cpu")
        assert period_of(database, budget) == (30, 0)
        first = await ledger.settle(ticket, complete(10, 5))
        assert (first.cost_micro, first.currency, first.is_new) == (20, "USD", True)
        again = await ledger.settle(ticket, complete(10, 20))
        assert (again.cost_micro, again.currency, again.is_new) == (20, "USD", False)
        assert period_of(database, budget) == (0, 15)
        twice = await asyncio.gather(*(ledger.settle(ticket, complete()) for _ in range(3)))
        assert not any(receipt.is_new for receipt in twice)
        return ticket.usage.usage_id

    row = row_of(database, run(scenario))
    assert (row.state, row.reason, row.output_tokens, row.cost_micro) == (
        "settled", "complete", 5, 20,
    )  # fmt: skip


def test_settling_twice_in_one_transaction_counts_once(run, database, tenant):
    budget = tenant.budget(1000)

    async def scenario(ledger):
        ticket = await ledger.open(tenant.usage())
        both = await asyncio.gather(
            ledger.settle(ticket, complete(10, 5)), ledger.settle(ticket, complete(10, 7))
        )
        assert [receipt.is_new for receipt in both] == [True, False]

    run(scenario)
    assert period_of(database, budget) == (0, 15)


def test_of_many_requests_at_once_exactly_those_that_fit_pass(run, database, tenant):
    budget = tenant.budget(30 * 7 + 29)

    async def scenario(ledger):
        found = await open_many(ledger, tenant, 40)
        tickets = [one for one in found if isinstance(one, Ticket)]
        refused = [one for one in found if not isinstance(one, Ticket)]
        assert len(tickets) == 7
        assert all(isinstance(one, QuotaError) for one in refused)
        assert "239 tokens: 0 tokens spent, 210 tokens reserved" in str(refused[0])
        assert "29 tokens left" in str(refused[0])
        assert count_rows(database) == 7
        await asyncio.gather(*(ledger.settle(one, complete(10, 0)) for one in tickets))
        assert period_of(database, budget) == (0, 70)
        assert len([1 for one in await open_many(ledger, tenant, 40) if isinstance(one, Ticket)])

    with pytest.raises(QuotaError):
        run(lambda ledger: _refuse(ledger, tenant, 300))
    run(scenario)


async def _refuse(ledger, tenant, tokens):
    await ledger.open(tenant.usage(tokens, 0))


def test_a_request_that_one_budget_refuses_changes_nothing(run, database, tenant, still):
    wide, narrow = tenant.budget(10_000), tenant.budget(10, period="day")
    tenant.limit("requests", 5)

    async def scenario(ledger):
        with pytest.raises(QuotaError, match="10 tokens per day"):
            await ledger.open(tenant.usage())
        tickets = [await ledger.open(tenant.usage(1, 1)) for _ in range(5)]
        with pytest.raises(RateLimitError) as caught:
            await ledger.open(tenant.usage(0, 0))
        assert caught.value.kind == "requests"
        assert 0 < caught.value.retry_after_s <= 60
        await asyncio.gather(*(ledger.settle(one, complete(1, 1)) for one in tickets))

    run(scenario, clock=still)
    assert period_of(database, wide) == period_of(database, narrow) == (0, 10)
    assert count_rows(database) == 5


def test_limits_count_input_at_open_and_output_at_settle(run, tenant, still):
    tenant.limit("input_tokens", 100)
    tenant.limit("output_tokens", 50)
    tenant.limit("requests", 1, model="another")

    async def scenario(ledger):
        ticket = await ledger.open(tenant.usage(60, 1000))
        kinds = {state.kind: (state.limit, state.remaining) for state in ticket.limits}
        assert kinds == {"input_tokens": (100, 40), "output_tokens": (50, 50)}
        with pytest.raises(RateLimitError, match="60 are used and this request needs 41"):
            await ledger.open(tenant.usage(41, 1))
        with pytest.raises(RateLimitError) as caught:
            await ledger.open(tenant.usage(101, 1))
        assert "alone needs 101" in (caught.value.hint or "")
        await ledger.settle(ticket, complete(60, 50))
        with pytest.raises(RateLimitError) as caught:
            await ledger.open(tenant.usage(1, 1))
        assert caught.value.kind == "output_tokens"

    run(scenario, clock=still)


def test_a_request_costs_the_price_at_its_opening_and_reserves_the_dearest_chip(
    run, database, tenant
):
    for chip, micro in (("cpu", 3_000_000), ("gpu", 5_000_000)):
        tenant.price("output", micro, chip=chip)
    budget = tenant.budget(10**6, currency="USD")

    async def scenario(ledger):
        ticket = await ledger.open(tenant.usage(10, 20, chips=("cpu", "gpu")))
        assert period_of(database, budget) == (100, 0)
        tenant.price("output", 7_000_000, chip="cpu")
        await asyncio.to_thread(ledger.cache.refresh)
        receipt = await ledger.settle(ticket, complete(10, 20))
        assert receipt.cost_micro == 60
        after = await ledger.open(tenant.usage())
        assert (await ledger.settle(after, complete(10, 20))).cost_micro == 140

    run(scenario)
    assert period_of(database, budget) == (0, 200)


def test_money_of_one_currency_does_not_pay_in_another(run, tenant):
    tenant.price("output", 1_000_000, currency="CNY")
    tenant.budget(10**9, currency="USD")

    async def scenario(ledger):
        with pytest.raises(QuotaError, match="is in USD, and this model may be paid in CNY"):
            await ledger.open(tenant.usage())
        tenant.budget(10**9, currency="CNY")
        await asyncio.to_thread(ledger.cache.refresh)
        await ledger.settle(await ledger.open(tenant.usage()), complete())

    run(scenario)


@pytest.mark.parametrize("reason", ["error", "client_gone", "replica_lost", "timeout"])
def test_nothing_is_billed_when_nothing_left_the_gateway(run, database, tenant, reason):
    tenant.price("input", 1_000_000)
    tenant.price("request", 10**12)
    budget = tenant.budget(1000)

    async def scenario(ledger):
        ticket = await ledger.open(tenant.usage())
        nothing = Settlement(reason=reason, chip="cpu", input_tokens=10, status=500)
        assert (await ledger.settle(ticket, nothing)).cost_micro == 0
        ticket = await ledger.open(tenant.usage())
        partly = Settlement(reason=reason, chip="cpu", input_tokens=10, output_tokens=1)
        assert (await ledger.settle(ticket, partly)).cost_micro == 10 + 1_000_000

    run(scenario)
    assert period_of(database, budget) == (0, 11)


def test_a_key_is_refused_within_a_second_after_it_was_revoked(run, database, tenant):
    async def scenario(ledger):
        assert (await ledger.authenticate(tenant.key)).key_id == tenant.principal.key_id
        with pytest.raises(AuthError, match="not known"):
            await ledger.authenticate("sk-wrong")
        with database.begin() as connection:
            keys.revoke_key(connection, tenant.principal.key_id, now_us=now_us())
        revoked_s = time.monotonic()
        caught = None
        while caught is None and time.monotonic() < revoked_s + 1:
            await asyncio.sleep(0.02)
            try:
                await ledger.authenticate(tenant.key)
            except AuthError as error:
                caught = error
        assert "revoked" in str(caught)

    run(scenario)


def test_keys_of_disabled_owners_and_expired_keys_are_refused(run, database, tenant):
    with database.begin() as connection:
        tenants.set_active(connection, schema.organizations, tenant.principal.org_id, False)

    async def scenario(ledger):
        with pytest.raises(AuthError, match="disabled"):
            await ledger.authenticate(tenant.key)
        with database.begin() as connection:
            tenants.set_active(connection, schema.organizations, tenant.principal.org_id, True)
            connection.execute(update(schema.api_keys).values(expires_us=now_us()))
        await asyncio.to_thread(ledger.cache.refresh)
        with pytest.raises(AuthError, match="expired"):
            await ledger.authenticate(tenant.key)

    run(scenario)


def test_a_request_whose_caller_went_away_is_closed_again(run, database, tenant):
    budget = tenant.budget(1000)

    async def scenario(ledger):
        await ledger.start()
        num_cancelled = 0
        other = await ledger.open(tenant.usage())  # a lone request is written at once
        for num_steps in range(5):  # cancelled before, while and after it is written
            task = asyncio.create_task(ledger.open(tenant.usage()))
            for _ in range(num_steps):
                await asyncio.sleep(0)
            task.cancel()
            try:
                await ledger.settle(await task, Settlement(reason="error"))
            except asyncio.CancelledError:
                num_cancelled += 1
        assert num_cancelled >= 3
        await ledger.settle(other, Settlement(reason="error"))
        settled = asyncio.create_task(ledger.settle(await ledger.open(tenant.usage()), complete()))
        await asyncio.sleep(0)
        settled.cancel()

    run(scenario)
    assert count_rows(database, state="open") == 0
    assert period_of(database, budget) == (0, 30)


def test_an_operation_the_database_refuses_does_not_stop_others(run, database, tenant):
    budget = tenant.budget(2**62)

    async def scenario(ledger):
        ticket = await ledger.open(tenant.usage())
        bad = complete(replica="\ud800")  # no text of UTF-8
        found = await asyncio.gather(
            ledger.open(tenant.usage()), ledger.settle(ticket, bad), ledger.open(tenant.usage()),
            return_exceptions=True,
        )  # fmt: skip
        assert isinstance(found[1], InternalError)
        for one in (ticket, found[0], found[2]):
            assert (await ledger.settle(one, complete())).is_new

    run(scenario)
    assert period_of(database, budget) == (0, 90)


def test_an_id_that_was_used_is_an_error_and_counts_nothing(run, database, tenant):
    budget = tenant.budget(1000)

    async def scenario(ledger):
        usage = tenant.usage()
        ticket = await ledger.open(usage)
        found = await asyncio.gather(
            ledger.open(usage), ledger.open(tenant.usage()), return_exceptions=True
        )
        assert isinstance(found[0], InternalError)
        assert "was used before" in str(found[0])
        for one in (ticket, found[1]):
            await ledger.settle(one, complete())

    run(scenario)
    assert period_of(database, budget) == (0, 60)


def test_progress_is_written_and_does_not_touch_what_is_settled(run, database, tenant):
    async def scenario(ledger):
        one, two = await ledger.open(tenant.usage()), await ledger.open(tenant.usage())
        ledger.progress(one, 10, 3, chip="gpu")
        ledger.progress(two, 10, 4)
        await ledger.settle(two, complete(10, 5))
        until_s = time.monotonic() + 5
        while row_of(database, one.usage.usage_id).output_tokens == 0:
            assert time.monotonic() < until_s
            await asyncio.sleep(0.01)
        noted = row_of(database, one.usage.usage_id)
        assert (noted.input_tokens, noted.output_tokens, noted.chip) == (10, 3, "gpu")
        assert row_of(database, two.usage.usage_id).output_tokens == 5
        await ledger.settle(one, complete())

    run(scenario, progress_s=0.05)


def test_the_check_names_what_does_not_balance(database, tenant):
    budget = tenant.budget(1000)

    async def scenario():
        ledger = SqlLedger(database)
        ticket = await ledger.open(tenant.usage())
        await ledger.open(tenant.usage())
        await ledger.settle(ticket, complete())
        await ledger.close()

    asyncio.run(scenario())
    assert check(database) == []
    with database.begin() as connection:
        connection.execute(update(schema.budget_periods).values(reserved=31, spent=29))
        connection.execute(
            update(schema.usage).where(schema.usage.c.state == "settled").values(cost_micro=1)
        )
    lines = check(database)
    assert any("costs 1, but its prices make 0" in line for line in lines)
    assert f"budget {budget}, period 0: 31 reserved, but open rows hold 30" in lines
    assert f"budget {budget}, period 0: 29 spent, but settled rows cost 30" in lines


def test_the_fast_cost_is_the_cost():
    amounts = (0, 1, 7, 1000)
    for rates in itertools.product((0, 1, 499_999, 3_000_001), repeat=2):
        prices = [
            pricing.Price(id=str(index), kind=kind, micro_per_million=rate, currency="USD")
            for index, (kind, rate) in enumerate(
                zip(pricing.KINDS, itertools.cycle(rates), strict=False)
            )
        ]
        tariff = Rules(1, {}, {}, {}, {}, prices).tariff("m", "c", 5)
        applied = pricing.choose_all(prices, "m", "c", 5)
        assert tariff.text == pricing.encode_applied(applied)
        for used in itertools.product(amounts, repeat=3):
            made = {"input_tokens": used[0] + 5, "cached_tokens": 5, "output_tokens": used[1] + 3,
                    "reasoning_tokens": 3, "device_us": used[2]}  # fmt: skip
            settlement = Settlement(reason="complete", **made)
            assert tariff.cost(settlement) == pricing.cost(pricing.quantities(**made), applied)


def test_an_opening_is_composed_without_a_database(tenant):
    rules = Rules(1, {}, {}, {}, {}, [])
    opening = compose_opening(
        rules, Periods(), tenant.usage(), gateway_id="gw", now_us=90_000_000, deadline_s=0,
        future=None,
    )  # fmt: skip
    assert (opening.window, opening.budgets, opening.limits) == (60_000_000, (), ())


def test_a_new_key_works_at_once_and_guesses_do_not_hammer_the_database(run, database, tenant):
    async def check(ledger):
        await ledger.authenticate(tenant.key)
        for name in ("first", "second"):
            with database.begin() as connection:
                _, key = keys.create_key(
                    connection, tenant.principal.project_id, name=name, now_us=now_us()
                )
            await ledger.authenticate(key)
        num_looks, refresh = 0, ledger.cache.refresh

        def counted(**options):
            nonlocal num_looks
            num_looks += 1
            refresh(**options)

        ledger.cache.refresh = counted
        began_s = time.monotonic()
        tries = (ledger.authenticate(f"sk-guess-{at}") for at in range(300))
        found = await asyncio.gather(*tries, return_exceptions=True)
        assert {type(error) for error in found} == {AuthError}
        took_s = time.monotonic() - began_s
        assert num_looks <= 2 + 10 * took_s
        await ledger.authenticate(tenant.key)

    run(check)
