"""Compares what clients got with what the ledger says, after everything has come to rest."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from chaos.clients import Outcome, Tenant
from mxn.ledger import schema
from mxn.ledger.balance import check
from mxn.ledger.database import Database

REST_S = 60.0


@dataclass(frozen=True, slots=True)
class Verdict:
    problems: list[str]
    counts: Counter[str]
    rows: int
    moved: int  # requests that went on from another replica
    reasons: Counter[str]


def wait_for_rest(database: Database) -> None:
    """Return when no row is open any more: what died has been settled by a gateway that lives."""
    until_s = time.monotonic() + REST_S
    while True:
        with database.read() as connection:
            usage = schema.usage
            query = usage.select().where(usage.c.state != "settled")
            left = [row.id for row in connection.execute(query)]
        if not left:
            return
        assert time.monotonic() < until_s, f"still open after {REST_S} s: {left[:5]}"
        time.sleep(0.5)


def judge(database: Database, outcomes: Sequence[Outcome], tenants: Iterable[Tenant]) -> Verdict:
    """Return every way in which ledger and clients disagree, in words."""
    problems = list(check(database))
    with database.read() as connection:
        found = list(connection.execute(schema.usage.select()))
        periods = list(connection.execute(schema.budget_periods.select()))
        limits = {row.id: row.limit_amount for row in connection.execute(schema.budgets.select())}
    rows = {row.id: row for row in found}
    for outcome in outcomes:
        problems += _compare(outcome, rows)
    for row in found:
        if row.state != "settled":
            problems.append(f"{row.id} is {row.state}")
        if row.reason == "complete" and not row.output_tokens:
            problems.append(f"{row.id} is complete and has no tokens")
    for period in periods:
        if period.reserved:
            problems.append(f"budget {period.budget_id}: {period.reserved} are still reserved")
        if period.spent > limits[period.budget_id]:
            problems.append(
                f"budget {period.budget_id}: {period.spent} spent of {limits[period.budget_id]}"
            )
    problems += _unequal_texts(outcomes)
    return Verdict(
        problems=problems,
        counts=Counter(outcome.kind for outcome in outcomes),
        rows=len(found),
        # Two choices may run on two replicas from the start.
        moved=sum(
            rows[item.usage_id].num_replicas > 1
            for item in outcomes
            if item.kind == "finished" and item.choices == 1 and item.usage_id in rows
        ),
        reasons=Counter(row.reason for row in found),
    )


def _compare(outcome: Outcome, rows: dict) -> list[str]:
    if outcome.usage_id is None:
        return []
    row = rows.get(outcome.usage_id)
    if row is None:
        return [f"{outcome.usage_id} was answered and has no row"]
    if outcome.kind != "finished":
        return []
    told = (outcome.input_tokens, outcome.output_tokens)
    if (row.input_tokens, row.output_tokens) != told or row.reason != "complete":
        held = (row.input_tokens, row.output_tokens, row.reason)
        return [f"{outcome.usage_id}: the client was told {told}, the ledger says {held}"]
    return []


def _unequal_texts(outcomes: Sequence[Outcome]) -> list[str]:
    """Greedy answers to the same prompt must begin alike, however often their replica died."""
    longest: dict[str, str] = {}
    greedy = [item for item in outcomes if item.kind == "finished" and item.greedy]
    for item in greedy:
        assert item.greedy is not None
        if len(item.text) > len(longest.get(item.greedy[0], "")):
            longest[item.greedy[0]] = item.text
    return [
        f"{item.usage_id}: {item.text!r} is no beginning of {longest[item.greedy[0]]!r}"
        for item in greedy
        if item.greedy and not longest[item.greedy[0]].startswith(item.text.rstrip("�"))
    ]
