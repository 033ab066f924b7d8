"""Keys, prices, roll-ups and statements against a real database file."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, func, insert, select

from mxn.errors import ConfigError, InternalError, NotFoundError
from mxn.ledger import budget_admin, keys, limits, prices, pricing, rollup, schema, tenants
from mxn.ledger.moments import MAX_US, parse_zone
from mxn.ledger.prices import NewPrice
from mxn.ledger.statements import statement

HOUR = 3600 * 10**6
DAY = 24 * HOUR
NOW = 1_793_000_000 * 10**6


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    made = create_engine(f"sqlite:///{tmp_path_factory.mktemp('ledger') / 'ledger.db'}")
    schema.metadata.create_all(made)
    yield made
    made.dispose()


@pytest.fixture
def connection(engine):
    """A transaction that leaves nothing behind."""
    with engine.connect() as opened:
        yield opened
        opened.rollback()


@pytest.fixture
def project(connection):
    return tenants.ensure_default(connection, now_us=NOW)


def test_the_default_project_is_made_once(connection, project):
    assert tenants.ensure_default(connection, now_us=NOW + 1) == project
    assert len(tenants.list_rows(connection, schema.organizations)) == 1
    assert tenants.find_project(connection, "default/default").id == project


def test_names_that_two_organizations_use_need_the_organization(connection):
    one, two = (tenants.create_org(connection, name, now_us=NOW) for name in ("one", "two"))
    for org in (one, two):
        tenants.create_project(connection, org, "chat", now_us=NOW, weight=2.0)
    assert tenants.find_project(connection, "two/chat").org_id == two
    with pytest.raises(NotFoundError, match="2 organizations") as caught:
        tenants.find_project(connection, "chat")
    assert caught.value.hint == "write ORG/chat"
    with pytest.raises(ConfigError, match="exists already"):
        tenants.create_project(connection, one, "chat", now_us=NOW)
    with pytest.raises(NotFoundError) as caught:
        tenants.find_org(connection, "onee")
    assert caught.value.hint == "did you mean 'one'?"


def test_a_key_is_kept_as_its_digest_only(connection, project):
    key_id, key = keys.create_key(connection, project, name="ci", now_us=NOW, models=["m"])
    row = keys.find_key(connection, "ci")
    assert (row.id, row.digest, row.prefix) == (key_id, keys.digest(key), key[:11])
    assert key not in str(tuple(row))
    assert keys.decode_list(row.models) == {"m"}
    assert keys.find_key(connection, key).id == key_id


def test_a_rotated_key_works_through_its_grace_and_no_longer(connection, project):
    key_id, _ = keys.create_key(
        connection, project, name="ci", now_us=NOW, scopes=["admin"], expires_us=NOW + DAY
    )
    row = keys.find_key(connection, key_id)
    new_id, key, ends = keys.rotate_key(connection, row, now_us=NOW, grace_us=HOUR)
    old, new = keys.find_key(connection, key_id), keys.find_key(connection, key)
    assert (old.expires_us, old.replaced_by, ends) == (NOW + HOUR, new_id, NOW + HOUR)
    assert (new.scopes, new.expires_us) == (row.scopes, NOW + DAY)
    assert keys.state(old, NOW + HOUR - 1) == "ending"
    assert keys.state(old, NOW + HOUR) == "expired"
    with pytest.raises(ConfigError, match="ending"):
        keys.rotate_key(connection, old, now_us=NOW, grace_us=HOUR)
    soon, _ = keys.create_key(connection, project, name="s", now_us=NOW, expires_us=NOW + 5)
    row = keys.find_key(connection, soon)
    assert keys.rotate_key(connection, row, now_us=NOW, grace_us=HOUR)[2] == NOW + 5


def test_a_revoked_key_keeps_its_first_end(connection, project):
    key_id, _ = keys.create_key(connection, project, name="ci", now_us=NOW)
    assert keys.revoke_key(connection, key_id, now_us=NOW)
    assert not keys.revoke_key(connection, key_id, now_us=NOW + 5)
    row = keys.find_key(connection, key_id)
    assert (row.revoked_us, keys.state(row, NOW)) == (NOW, "revoked")


@pytest.mark.parametrize("wrong", [{"scopes": ["root"]}, {"scopes": []}, {"models": []},
                                   {"expires_us": NOW}, {"name": ""}])  # fmt: skip
def test_a_key_that_could_do_nothing_is_refused(connection, project, wrong):
    with pytest.raises(ConfigError):
        keys.create_key(connection, project, **{"name": "k", "now_us": NOW} | wrong)


def test_importing_a_key_twice_gives_one_row(engine):
    database = SimpleNamespace(begin=engine.begin)
    key = keys.new_key()
    first = keys.import_key(database, key)
    assert keys.import_key(database, key) == first
    with engine.begin() as connection:
        keys.revoke_key(connection, first, now_us=NOW)
    assert keys.import_key(database, key) == first
    with engine.connect() as connection:
        assert keys.find_key(connection, key).revoked_us == NOW


def test_a_limit_and_a_budget_are_changed_in_place(connection, project):
    whom = tenants.Subject("project", project)
    first = limits.set_limit(connection, whom, "requests", 60)
    assert limits.set_limit(connection, whom, "requests", 90) == first
    assert limits.set_limit(connection, whom, "requests", 5, model="m") != first
    assert [row.per_minute for row in limits.list_limits(connection)] == [90, 5]
    limits.remove_limit(connection, first)
    with pytest.raises(NotFoundError):
        limits.remove_limit(connection, first)
    budget = budget_admin.set_budget(
        connection, whom, limit_amount=10, period="day", now_us=NOW, currency="usd"
    )
    period = {"budget_id": budget, "period_start": 5, "reserved": 2, "spent": 3}
    connection.execute(insert(schema.budget_periods).values(**period))
    budget_admin.set_budget(
        connection, whom, limit_amount=20, period="day", now_us=NOW, currency="USD"
    )
    (row,) = budget_admin.list_budgets(connection)
    assert (row["unit"], row["currency"], row["left"]) == ("micro", "USD", 15)
    budget_admin.remove_budget(connection, budget)
    assert budget_admin.list_budgets(connection) == []


def _new(rate, since, *, model="m", chip="c", kind="input", currency="USD", until=None):
    return NewPrice(
        model=model, chip=chip, kind=kind, micro_per_million=rate, currency=currency,
        valid_from_us=since, valid_to_us=until,
    )  # fmt: skip


def test_a_new_price_closes_the_old_one_at_its_start(connection):
    prices.set_prices(connection, [_new(1, NOW)], now_us=NOW)
    prices.set_prices(connection, [_new(3, NOW + 2 * DAY)], now_us=NOW)
    prices.set_prices(connection, [_new(2, NOW + DAY)], now_us=NOW)
    spans = [(p.micro_per_million, p.valid_from_us - NOW, p.valid_to_us) for p in
             prices.load_prices(connection)]  # fmt: skip
    assert spans == [(1, 0, NOW + DAY), (2, DAY, NOW + 2 * DAY), (3, 2 * DAY, None)]
    assert prices.set_prices(connection, [_new(3, NOW + 2 * DAY)], now_us=NOW) == []
    with pytest.raises(ConfigError, match="the past has a price"):
        prices.set_prices(connection, [_new(9, NOW + 1)], now_us=NOW + 2)
    prices.end_price(connection, "m", "c", "input", at_us=NOW + 3 * DAY, now_us=NOW)
    assert prices.load_prices(connection)[-1].valid_to_us == NOW + 3 * DAY


def test_prices_that_can_meet_have_one_currency(connection):
    prices.set_prices(connection, [_new(1, NOW, chip="*")], now_us=NOW)
    with pytest.raises(ConfigError, match="a request could cost"):
        prices.set_prices(
            connection, [_new(1, NOW, model="*", kind="output", currency="CNY")], now_us=NOW
        )


def test_an_explanation_names_why_others_do_not_apply():
    known = [
        pricing.Price(id=name, model=model, chip=chip, kind="input", micro_per_million=1,
                      currency="USD", valid_from_us=since)
        for name, model, chip, since in
        [("any", "*", "*", 0), ("best", "m", "c", 0), ("soon", "m", "c", 99), ("else", "x", "*", 0)]
    ]  # fmt: skip
    found = {kind: (chosen, others) for kind, chosen, others in prices.explain(known, "m", "c", 5)}
    chosen, others = found["cached"]
    assert chosen is known[1]
    why = {price.id: reason for price, reason in others}
    assert why["any"] == "only where cached has no price of its own"
    assert why["soon"].startswith("starts at")
    assert "else" not in why
    assert dict((p.id, why) for p, why in found["input"][1])["any"].startswith("less specific")


STEPS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 4), st.none() | st.integers(1, 10)), max_size=12
)
QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUICK
@given(STEPS)
def test_prices_of_one_line_never_overlap(engine, steps):
    with engine.connect() as connection:
        for at, rate, length in steps:
            until = None if length is None else at + length
            prices.set_prices(connection, [_new(rate, at, until=until)], now_us=0)
            chosen = pricing.choose(prices.load_prices(connection), "m", "c", "input", at)
            assert chosen is not None
            assert chosen.micro_per_million == rate
        known = prices.load_prices(connection)
        for at in range(45):
            assert sum(price.holds_at(at) for price in known) <= 1
        connection.rollback()


def _fill(connection, seed, count, days):
    """Insert random rows, settled by random prices within some days before NOW; return them."""
    dice = random.Random(seed)
    rows = []
    for number in range(count):
        tokens = [dice.randrange(3000) for _ in range(2)]
        row = {
            "id": f"u{number}", "request_id": "r", "gateway_id": "g", "endpoint": "chat",
            "org_id": dice.choice(["o1", "o2"]), "project_id": "p",
            "user_id": dice.choice([None, "u"]), "key_id": dice.choice(["k1", "k2"]),
            "model": dice.choice(["m1", "m2"]), "chip": dice.choice(["c1", "c2"]), "replica": "x",
            "state": dice.choice(["settled"] * 9 + ["open"]), "opened_us": NOW - days * DAY,
            "settled_us": NOW - dice.randrange(days * DAY), "reason": "complete", "status": 200,
            "input_tokens": tokens[0], "cached_tokens": dice.randint(0, tokens[0]),
            "output_tokens": tokens[1], "reasoning_tokens": dice.randint(0, tokens[1]),
            "device_us": dice.randrange(10**7), "num_replicas": 1, "basis": "engine",
            "is_stream": False, "reserved": "[]", "currency": "",
        }  # fmt: skip
        kinds = dice.sample(pricing.KINDS, dice.randrange(4))
        applied = {
            kind: pricing.Applied(kind=kind, price_id="p", currency="USD",
                                  micro_per_million=dice.choice([1, 333_333, 1_500_000]))
            for kind in kinds
        }  # fmt: skip
        names = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "device_us")
        amounts = pricing.quantities(**{name: row[name] for name in names})
        row["cost_micro"] = pricing.cost(amounts, applied)
        row["currency"] = pricing.currency_of(applied)
        row["prices"] = pricing.encode_applied(applied)
        rows.append(row)
    if rows:
        connection.execute(insert(schema.usage), rows)
    return [row for row in rows if row["state"] == "settled"]


@QUICK
@given(st.integers(0, 10**6), st.integers(0, 60), st.integers(1, 5),
       st.sampled_from(["UTC", "Asia/Shanghai", "America/New_York"]),
       st.sets(st.sampled_from(sorted(rollup.GROUPS)), max_size=3),
       st.integers(0, 5 * DAY), st.integers(0, 5 * DAY))  # fmt: skip
def test_rolled_days_and_fresh_rows_are_the_sum_of_all_rows(
    engine, seed, count, days, zone, by, back, length
):
    since = NOW - back
    until = since + length
    with engine.connect() as connection:
        rows = _fill(connection, seed, count, days)
        wanted = [row for row in rows if since <= row["settled_us"] < until]
        before = rollup.summarize(connection, by, since_us=since, until_us=until, zone_name=zone)
        rollup.roll_up(connection, zone, now_us=NOW - DAY)
        rollup.roll_up(connection, zone, now_us=NOW)
        after = rollup.summarize(connection, by, since_us=since, until_us=until, zone_name=zone)
        other = rollup.summarize(connection, by, since_us=since, until_us=until, zone_name="UTC")
        connection.rollback()
    assert after == before
    for measure in rollup.SUMS:
        assert sum(row[measure] for row in after) == sum(row[measure] for row in wanted)
    assert sum(row["requests"] for row in other) == len(wanted)


def test_rolling_up_again_changes_nothing(connection):
    _fill(connection, 3, 80, 4)
    done = rollup.roll_up(connection, "UTC", now_us=NOW)
    table = list(connection.execute(select(schema.usage_days)))
    assert len(done) == 4
    assert len(set(done)) == 4
    assert rollup.roll_up(connection, "UTC", now_us=NOW) == []
    assert rollup.roll_up(connection, "UTC", now_us=NOW, is_rebuild=True) == done
    assert sorted(connection.execute(select(schema.usage_days)), key=str) == sorted(table, key=str)
    moved = rollup.roll_up(connection, "Asia/Kolkata", now_us=NOW)
    assert moved
    assert connection.execute(select(func.sum(schema.usage_days.c.requests))).scalar() > 0


@QUICK
@given(st.integers(0, 10**6), st.integers(0, 60))
def test_a_statement_is_the_sum_of_its_rows_to_the_micro(engine, seed, count):
    with engine.connect() as connection:
        rows = [row for row in _fill(connection, seed, count, 3) if row["org_id"] == "o1"]
        bills = statement(connection, since_us=0, until_us=MAX_US, where={"org_id": "o1"})
        connection.rollback()
    assert sum(bill.total_micro for bill in bills) == sum(row["cost_micro"] for row in rows)
    assert sum(bill.requests for bill in bills) == len(rows)
    for bill in bills:
        amounts = sum(line.amount_micro for line in bill.lines)
        assert amounts + bill.rounding_micro == bill.total_micro
    for field, kinds in (("input_tokens", ("input", "cached")),
                         ("output_tokens", ("output", "reasoning"))):  # fmt: skip
        billed = sum(line.quantity for bill in bills for line in bill.lines if line.kind in kinds)
        assert billed == sum(row[field] for row in rows)


def test_a_statement_refuses_rows_that_do_not_cost_what_their_prices_say(connection):
    _fill(connection, 1, 10, 1)
    connection.execute(schema.usage.update().values(cost_micro=schema.usage.c.cost_micro + 10))
    with pytest.raises(InternalError, match="their prices make"):
        statement(connection, since_us=0, until_us=MAX_US, where={})


def test_zones_and_groups_that_do_not_exist_are_refused(connection):
    with pytest.raises(ConfigError, match="time zone"):
        rollup.roll_up(connection, "Mars/Base", now_us=NOW)
    with pytest.raises(ConfigError, match="grouped by"):
        rollup.summarize(connection, ["colour"])
    assert parse_zone("utc") is parse_zone("Z")
