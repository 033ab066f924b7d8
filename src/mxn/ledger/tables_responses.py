"""The table of stored answers of the Responses API, by tenant."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Table, Text

from mxn.ledger.schema import metadata

responses = Table(
    "responses",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("previous_id", Text),
    Column("input", Text, nullable=False),  # JSON: the items of this request, not of earlier ones
    Column("body", Text, nullable=False),  # JSON: the response
    Index("responses_by_project", "project_id", "created_us"),
)
