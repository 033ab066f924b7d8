"""The table that says which days are rolled up, and by whose midnight."""

from __future__ import annotations

from sqlalchemy import Column, Integer, Table, Text

from mxn.ledger.schema import metadata

rollup_state = Table(
    "rollup_state",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # always 1
    Column("time_zone", Text, nullable=False),
    Column("through_day", Text, nullable=False),  # this day is the first that is not rolled up
)
