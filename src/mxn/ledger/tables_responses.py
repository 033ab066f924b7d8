"""The table of stored answers of the Responses API, by tenant."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Table, Text, text

from mxn.ledger.schema import metadata

_UNDER_WAY = text("owner IS NOT NULL")

responses = Table(
    "responses",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("previous_id", Text),
    Column("input", Text, nullable=False),  # JSON: the items of this request, not of earlier ones
    Column("body", Text, nullable=False),  # JSON: the response
    Column("owner", Text),  # the gateway that makes it; none once it is final
    Index("responses_by_project", "project_id", "created_us"),
    Index("responses_under_way", "owner", sqlite_where=_UNDER_WAY, postgresql_where=_UNDER_WAY),
)
