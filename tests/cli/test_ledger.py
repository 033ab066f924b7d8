"""`mxn keys`, `price`, `usage` and the rest as an administrator runs them, on a fresh machine."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import insert

from mxn.cli.local_key import ensure_local_key
from mxn.errors import ConfigError
from mxn.ledger import pricing, schema
from mxn.ledger.database import Database
from mxn.ledger.export import USAGE_COLUMNS


def test_a_key_works_at_once_on_a_fresh_machine(mxn):
    made = mxn("keys", "create", "ci", "--expires", "30d")
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    assert key.startswith("sk-")
    assert len(key) == 46
    (row,) = json.loads(mxn("keys", "list", "--json").stdout)
    assert (row["name"], row["prefix"], row["state"]) == ("ci", key[:11], "active")
    assert key not in json.dumps(row)
    rotated = json.loads(mxn("keys", "rotate", "ci", "--grace", "1h", "--json").stdout)
    assert rotated["replaces"] == row["id"]
    refused = mxn("keys", "revoke", row["id"])
    assert (refused.returncode, "--yes" in refused.stderr) == (2, True)
    assert mxn("keys", "revoke", row["id"], "--yes").returncode == 0
    states = {one["id"]: one["state"] for one in json.loads(mxn("keys", "list", "--all", "--json")
                                                            .stdout)}  # fmt: skip
    assert states == {row["id"]: "revoked", rotated["id"]: "active"}


def test_a_price_list_survives_export_and_import(mxn, home):
    assert mxn("price", "set", "m", "--input", "0.5", "--output", "1.5").returncode == 0
    assert mxn("price", "set", "*", "--chip", "c", "--request", "0.000001").returncode == 0
    for style in ("toml", "csv", "json"):
        listed = mxn("price", "export", "--format", style)
        (home / f"list.{style}").write_text(listed.stdout)
        other = f"sqlite:///{home / style}.db"
        done = mxn("price", "import", home / f"list.{style}", "--yes", "--database", other)
        assert done.returncode == 0, done.stderr
        again = mxn("price", "export", "--format", style, "--database", other)
        assert again.stdout == listed.stdout
    explained = json.loads(mxn("price", "explain", "m", "--chip", "c", "--json").stdout)
    applies = {row["kind"]: row["applies"] and row["applies"]["price"] for row in explained}
    assert applies == {"input": "0.50", "cached": "0.50", "output": "1.50", "reasoning": "1.50",
                       "request": "0.000001", "device_second": None}  # fmt: skip


def test_a_bad_list_of_prices_sets_none_of_them(mxn, home):
    (home / "list.csv").write_text("model,chip,kind,price,currency\nm,c,input,1,USD\nm,c,x,1,USD\n")
    done = mxn("price", "import", home / "list.csv", "--yes")
    assert done.returncode == 2
    assert done.stderr.startswith("error: price 2: kind must be one of")
    assert json.loads(mxn("price", "list", "--json").stdout) == []


@pytest.fixture
def used(home):
    """A ledger with one settled request of the default organization."""
    database = Database.open(f"sqlite:///{home / 'ledger.db'}")
    applied = {"input": pricing.Applied(kind="input", price_id="p", micro_per_million=500_000,
                                        currency="USD")}  # fmt: skip
    row = dict.fromkeys(USAGE_COLUMNS, "") | {
        "id": "u1", "opened_us": 1793500000 * 10**6, "settled_us": 1793500001 * 10**6,
        "org_id": "org_default", "model": "m", "chip": "c", "state": "settled", "status": 200,
        "is_stream": False, "input_tokens": 3001, "cached_tokens": 0, "output_tokens": 5,
        "reasoning_tokens": 0, "device_us": 10, "num_replicas": 1, "cost_micro": 1501,
        "currency": "USD", "prices": pricing.encode_applied(applied), "batch_id": None,
    }  # fmt: skip
    with database.begin() as connection:
        connection.execute(insert(schema.usage).values(**row))
    database.close()


def test_sums_rows_and_a_statement_agree(mxn, used):
    assert mxn("project", "create", "x").returncode == 0  # makes the default organization too
    before = mxn("usage", "--by", "model,day", "--json").stdout
    (sums,) = json.loads(before)
    assert (sums["model"], sums["day"], sums["cost_micro"]) == ("m", "2026-11-01", 1501)
    (row,) = json.loads(mxn("usage", "rows", "--json").stdout)
    assert list(row) == list(USAGE_COLUMNS)
    assert mxn("usage", "rows", "--csv").stdout.splitlines()[0] == ",".join(USAGE_COLUMNS)
    done = mxn("usage", "statement", "--month", "2026-11", "--org", "default", "--json")
    (bill,) = json.loads(done.stdout)["bills"]
    assert (bill["total_micro"], bill["rounding_micro"]) == (1501, 0)
    assert [line["amount_micro"] for line in bill["lines"]] == [1501, 0]  # output has no price
    assert "0.001501 USD" in mxn("usage", "statement", "--month", "2026-11").stdout
    assert "0.001501 USD" in mxn("usage").stdout


def test_limits_and_budgets_are_set_listed_and_lifted(mxn):
    mxn("project", "create", "x", "--weight", "2")
    made = mxn("budget", "set", "--project", "x", "--limit", "10.50", "--period", "month")
    assert made.returncode == 0, made.stderr
    assert "10.50 USD" in mxn("budget", "list").stdout
    assert mxn("budget", "remove", made.stdout.strip(), "--yes").returncode == 0
    assert json.loads(mxn("budget", "list", "--json").stdout) == []
    limit = mxn("limit", "set", "--org", "default", "--per-minute", "60")
    assert limit.returncode == 0, limit.stderr
    (row,) = json.loads(mxn("limit", "list", "--json").stdout)
    assert (row["subject_kind"], row["per_minute"]) == ("org", 60)
    nobody = mxn("limit", "set", "--per-minute", "60")
    assert (nobody.returncode, "exactly one of" in nobody.stderr) == (2, True)


def test_many_commands_that_start_at_once_make_one_local_key(home, monkeypatch):
    monkeypatch.setenv("MXN_HOME", str(home))
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: ensure_local_key(), range(32)))
    assert len(made) == 1
    assert os.listdir(home) == ["key"]
    assert (home / "key").stat().st_mode & 0o777 == 0o600
    (home / "key").write_text("")
    with pytest.raises(ConfigError, match="holds no key"):
        ensure_local_key()


def test_the_books_are_checked_with_their_roll_ups(mxn, used, home):
    database = Database.open(f"sqlite:///{home / 'ledger.db'}")
    assert mxn("usage", "rollup", "--time-zone", "UTC", "--rebuild").returncode == 0
    done = mxn("usage", "check")
    assert (done.returncode, done.stderr.strip()) == (0, "the books balance"), done.stdout
    with database.begin() as connection:
        day = schema.usage_days
        connection.execute(insert(day).values(
            day="2026-10-02", org_id="o", project_id="p", user_id="", key_id="k", model="m",
            chip="c", currency="USD", requests=2,
        ))  # fmt: skip
    database.close()
    done = mxn("usage", "check", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["problems"] == [
        "day 2026-10-02: the roll-up says 2 requests, its rows 0"
    ]


def test_a_budget_comes_before_the_first_key(mxn):
    assert mxn("budget", "set", "--project", "default", "--limit", "5").returncode == 0
    assert "ever" in mxn("budget", "list").stdout
