"""Money, prices and times without a database: exact, and the most specific price wins."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxn.errors import ConfigError
from mxn.ledger import moments, pricing
from mxn.ledger.money import MAX_MICRO, check_currency, format_money, parse_decimal, parse_money
from mxn.ledger.pricing import KINDS, Applied, Price

AMOUNTS = st.integers(-MAX_MICRO, MAX_MICRO)
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Shanghai", "Asia/Kolkata"]


@given(AMOUNTS)
def test_money_survives_printing(micro):
    assert parse_money(format_money(micro)) == micro
    assert Decimal(format_money(micro)) == Decimal(micro) / 1_000_000


@pytest.mark.parametrize(
    ("text", "micro"),
    [("10.50", 10_500_000), ("0.000001", 1), ("-3", -3_000_000), (".5", 500_000), ("7.", 7_000_000),
     ("9223372036854.775807", MAX_MICRO)],
)  # fmt: skip
def test_money_as_people_write_it(text, micro):
    assert parse_money(text) == micro


@pytest.mark.parametrize(
    "text",
    ["", "1e3", "NaN", "inf", "1,000", "0.0000001", "ten", "٣", "9223372036854.775808", "9" * 500],
)
def test_what_is_not_exact_money_is_refused(text):
    with pytest.raises(ConfigError):
        parse_money(text)


def test_money_for_people_has_at_least_two_decimals():
    shown = [format_money(value, "USD") for value in (0, 1, 10_500_000, -1_234_567)]
    assert shown == ["0.00 USD", "0.000001 USD", "10.50 USD", "-1.234567 USD"]
    assert parse_decimal("0.000000000001", decimals=12) == 1


@pytest.mark.parametrize("text", ["US", "usdt", "€", "12A"])
def test_a_currency_has_three_letters(text):
    assert check_currency(" usd ") == "USD"
    with pytest.raises(ConfigError, match="three letters"):
        check_currency(text)


def _price(model="*", chip="*", kind="input", per_million=1, since=0, until=None):
    return Price(
        id=f"{model}/{chip}/{kind}", model=model, chip=chip, kind=kind, currency="USD",
        micro_per_million=per_million, valid_from_us=since, valid_to_us=until,
    )  # fmt: skip


def test_the_most_specific_price_wins():
    ladder = [_price(), _price(chip="c"), _price("m"), _price("m", "c")]
    for top in range(4):
        known = ladder[: top + 1]
        for order in (known, known[::-1]):
            assert pricing.choose(order, "m", "c", "input", 5) is ladder[top]
    assert pricing.choose(ladder, "m", "other", "input", 5) is ladder[2]
    assert pricing.choose(ladder, "other", "other", "input", 5) is ladder[0]


def test_a_price_holds_from_its_start_up_to_its_end():
    known = [_price("m", "c", since=10, until=20)]
    chosen = [pricing.choose(known, "m", "c", "input", at) for at in (9, 10, 19, 20)]
    assert chosen == [None, known[0], known[0], None]
    assert pricing.choose([_price(since=5, until=5)], "m", "c", "input", 5) is None


def test_cached_and_reasoning_tokens_fall_back_and_are_not_counted_twice():
    known = [_price(per_million=3_000_000), _price(kind="output", per_million=9_000_000)]
    applied = pricing.choose_all(known, "m", "c", 0)
    amounts = pricing.quantities(
        input_tokens=100, cached_tokens=40, output_tokens=10, reasoning_tokens=4
    )
    assert pricing.cost(amounts, applied) == 100 * 3 + 10 * 9
    cheap = pricing.choose_all([*known, _price(kind="cached", per_million=1_000_000)], "m", "c", 0)
    assert pricing.cost(amounts, cheap) == 60 * 3 + 40 * 1 + 10 * 9


def test_a_device_second_and_a_request_cost_what_they_say():
    known = [
        _price(kind="device_second", per_million=250),
        _price(kind="request", per_million=2 * 10**9),
    ]
    applied = pricing.choose_all(known, "m", "c", 0)
    amounts = pricing.quantities(device_us=4_000_000)
    assert pricing.cost(amounts, applied) == 4 * 250 + 2000


APPLIED = st.dictionaries(st.sampled_from(KINDS), st.integers(0, 10**12)).map(
    lambda rates: {
        kind: Applied(kind=kind, price_id="p", micro_per_million=rate, currency="USD")
        for kind, rate in rates.items()
    }
)


@given(APPLIED, st.lists(st.integers(0, 10**9), min_size=6, max_size=6))
def test_a_cost_is_rounded_once_and_half_up(applied, amounts):
    by_kind = dict(zip(KINDS, amounts, strict=True))
    exact = sum(
        (Fraction(by_kind[kind] * price.micro_per_million, 10**6)
         for kind, price in applied.items()),
        Fraction(0),
    )  # fmt: skip
    got = pricing.cost(by_kind, applied)
    assert -Fraction(1, 2) < got - exact <= Fraction(1, 2)


@given(APPLIED)
def test_what_a_row_keeps_of_its_prices_survives(applied):
    text = pricing.encode_applied(applied)
    assert pricing.decode_applied(text) == applied
    assert pricing.encode_applied(dict(reversed(applied.items()))) == text


def test_prices_of_two_currencies_are_not_added():
    one = Applied(kind="input", price_id="a", micro_per_million=1, currency="USD")
    two = Applied(kind="output", price_id="b", micro_per_million=1, currency="CNY")
    with pytest.raises(ConfigError, match="CNY and USD"):
        pricing.cost({"input": 1, "output": 1}, {"input": one, "output": two})


@given(st.integers(0, moments.MAX_US), st.sampled_from(ZONES))
def test_each_time_lies_in_exactly_one_day(at_us, name):
    zone = moments.parse_zone(name)
    day = moments.day_of(at_us, zone)
    assert moments.day_start_us(day, zone) <= at_us
    if day < "9998":
        assert at_us < moments.day_start_us(moments.next_day(day), zone)


def test_a_month_is_that_of_its_time_zone():
    berlin = moments.parse_zone("Europe/Berlin")
    start, end = moments.month_bounds_us("2026-10", berlin)
    assert (end - start) // 3_600_000_000 == 31 * 24 + 1  # the clocks go back on the 25th
    assert moments.iso(start) == "2026-09-30T22:00:00.000000+00:00"
    assert moments.month_bounds_us("2026-12", berlin)[1] == moments.day_start_us(
        "2027-01-01", berlin
    )


@pytest.mark.parametrize("text", ["2026-13", "26-01", "2026", "november"])
def test_what_is_no_month_is_refused(text):
    with pytest.raises(ConfigError, match="2026-11"):
        moments.month_bounds_us(text, moments.parse_zone("UTC"))


def test_times_as_people_write_them():
    zone, now = moments.parse_zone("Asia/Shanghai"), 10**15
    read = [
        moments.parse_moment(text, zone=zone, now_us=now)
        for text in ("2026-11-01", "2026-11-01T08:00", "2026-11-01T00:00:00Z", "now", "1d")
    ]
    midnight = 1793462400 * 10**6  # 2026-11-01 00:00 in Shanghai
    assert read == [midnight, midnight + 8 * 3600 * 10**6, midnight + 8 * 3600 * 10**6, now,
                    now - 86400 * 10**6]  # fmt: skip
    for text in ("yesterday", "2026-02-30", "0001-01-01T00:00+23:00", "30"):
        with pytest.raises(ConfigError, match="as a time"):
            moments.parse_moment(text, zone=zone, now_us=now)
    with pytest.raises(ConfigError, match="as a duration"):
        moments.parse_duration("1 month")


def test_a_model_without_a_price_of_its_own_is_priced_like_its_base():
    def priced(model: str, chip: str, rate: int) -> Price:
        return Price(
            id=f"{model}@{chip}", model=model, chip=chip, kind="input", micro_per_million=rate,
            currency="USD",
        )  # fmt: skip

    ladder = [
        priced("*", "*", 1), priced("*", "c", 2), priced("base", "*", 3), priced("base", "c", 4),
        priced("tuned", "*", 5), priced("tuned", "c", 6),
    ]  # fmt: skip
    for count in range(1, len(ladder) + 1):
        for order in (ladder[:count], ladder[:count][::-1]):
            chosen = pricing.choose(order, "tuned", "c", "input", 0, base="base")
            assert chosen is ladder[count - 1]
    assert pricing.choose(ladder[:4], "tuned", "c", "input", 0) is ladder[1]
    assert pricing.choose(ladder, "other", "c", "input", 0, base="base") is ladder[3]
