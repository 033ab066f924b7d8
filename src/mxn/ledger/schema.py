"""The tables of the ledger. Times are integer microseconds UTC, money is integer micro-units.

Rows of `usage` are opened before a request is sent to a replica and settled exactly once. Prices
are never changed, only ended and followed by a new row.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    true,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _micros(name: str, *, nullable: bool = False) -> Column[int]:
    return Column(name, BigInteger, nullable=nullable)


def _count(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False, server_default="0")


def _is_active() -> Column[bool]:
    return Column("is_active", Boolean, nullable=False, server_default=true())


organizations = Table(
    "organizations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    _micros("created_us"),
    _is_active(),
)

projects = Table(
    "projects",
    metadata,
    Column("id", Text, primary_key=True),
    Column("org_id", Text, ForeignKey("organizations.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("weight", Float, nullable=False, server_default="1"),
    Column("priority", Integer, nullable=False, server_default="0"),
    _micros("created_us"),
    _is_active(),
    UniqueConstraint("org_id", "name"),
)

users = Table(
    "users",
    metadata,
    Column("id", Text, primary_key=True),
    Column("org_id", Text, ForeignKey("organizations.id"), nullable=False),
    Column("name", Text, nullable=False),
    _micros("created_us"),
    _is_active(),
    UniqueConstraint("org_id", "name"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    Column("user_id", Text, ForeignKey("users.id")),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False),
    Column("digest", Text, nullable=False, unique=True),
    Column("scopes", Text, nullable=False),  # JSON list
    Column("models", Text),  # JSON list; null: every model
    _micros("created_us"),
    _micros("expires_us", nullable=True),
    _micros("revoked_us", nullable=True),
    Column("replaced_by", Text),
    _micros("last_used_us", nullable=True),
)

rate_limits = Table(
    "rate_limits",
    metadata,
    Column("id", Text, primary_key=True),
    Column("subject_kind", Text, nullable=False),  # org, project, user, key
    Column("subject_id", Text, nullable=False),
    Column("model", Text, nullable=False, server_default=""),  # '': any
    Column("kind", Text, nullable=False),  # requests, input_tokens, output_tokens
    Column("per_minute", BigInteger, nullable=False),
    _is_active(),
    Index(None, "subject_kind", "subject_id"),
)

rate_windows = Table(
    "rate_windows",
    metadata,
    Column("limit_id", Text, primary_key=True),
    Column("window_start", BigInteger, primary_key=True, autoincrement=False),
    _count("used"),
)

budgets = Table(
    "budgets",
    metadata,
    Column("id", Text, primary_key=True),
    Column("subject_kind", Text, nullable=False),
    Column("subject_id", Text, nullable=False),
    Column("unit", Text, nullable=False),  # tokens, micro
    Column("currency", Text, nullable=False, server_default=""),  # of micro; '' for tokens
    Column("period", Text, nullable=False),  # total, day, month
    Column("limit_amount", BigInteger, nullable=False),
    _micros("created_us"),
    _is_active(),
    Index(None, "subject_kind", "subject_id"),
)

budget_periods = Table(
    "budget_periods",
    metadata,
    Column("budget_id", Text, primary_key=True),
    Column("period_start", BigInteger, primary_key=True, autoincrement=False),
    _count("reserved"),
    _count("spent"),
)

# One row, counted up by triggers whenever a key, tenant, limit, budget or price changes, so that
# gateways can hold these in memory and see each change in time.
rules = Table(
    "rules",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # always 1
    Column("version", BigInteger, nullable=False),
)

prices = Table(
    "prices",
    metadata,
    Column("id", Text, primary_key=True),
    Column("model", Text, nullable=False),  # '*': any
    Column("chip", Text, nullable=False),  # '*': any
    Column("kind", Text, nullable=False),
    Column("micro_per_million", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    _micros("valid_from_us"),
    _micros("valid_to_us", nullable=True),
    _micros("created_us"),
    Index(None, "model", "chip", "kind", "valid_from_us"),
)

usage = Table(
    "usage",
    metadata,
    Column("id", Text, primary_key=True),
    Column("request_id", Text, nullable=False),
    Column("gateway_id", Text, nullable=False),
    Column("org_id", Text, nullable=False),
    Column("project_id", Text, nullable=False),
    Column("user_id", Text),
    Column("key_id", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("chip", Text, nullable=False, server_default=""),
    Column("replica", Text, nullable=False, server_default=""),
    Column("state", Text, nullable=False),  # open, settled
    _micros("opened_us"),
    _micros("settled_us", nullable=True),
    Column("reason", Text),
    Column("status", Integer),
    _count("input_tokens"),
    _count("cached_tokens"),
    _count("output_tokens"),
    _count("reasoning_tokens"),
    Column("num_replicas", Integer, nullable=False, server_default="0"),
    Column("basis", Text),
    _count("device_us"),
    _count("cost_micro"),
    Column("currency", Text, nullable=False, server_default=""),
    Column("prices", Text),  # JSON: what was applied
    Column("reserved", Text),  # JSON: [[budget, period start, amount]…] it is charged to
    Column("batch_id", Text),
    Column("is_stream", Boolean, nullable=False),
    Column("base", Text, nullable=False, server_default=""),  # priced like this model
    Index(None, "org_id", "opened_us"),
)
# Partial, since each index that a row is in costs time when it is opened and when it is settled.
_is_open, _is_of_batch = usage.c.state == "open", usage.c.batch_id.is_not(None)
_is_settled = usage.c.settled_us.is_not(None)
Index("ix_usage_settled_us", usage.c.settled_us, sqlite_where=_is_settled,
      postgresql_where=_is_settled)  # fmt: skip
Index("ix_usage_open", usage.c.gateway_id, sqlite_where=_is_open, postgresql_where=_is_open)
Index("ix_usage_batch", usage.c.batch_id, sqlite_where=_is_of_batch, postgresql_where=_is_of_batch)

gateways = Table(
    "gateways",
    metadata,
    Column("id", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    _micros("started_us"),
    _micros("heartbeat_us"),
    Column("state", Text, nullable=False),  # running, stopped, lost
)

usage_days = Table(
    "usage_days",
    metadata,
    Column("day", Text, primary_key=True),
    Column("org_id", Text, primary_key=True),
    Column("project_id", Text, primary_key=True),
    Column("user_id", Text, primary_key=True, server_default=""),
    Column("key_id", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("chip", Text, primary_key=True),
    Column("currency", Text, primary_key=True),
    _count("requests"),
    _count("input_tokens"),
    _count("cached_tokens"),
    _count("output_tokens"),
    _count("reasoning_tokens"),
    _count("device_us"),
    _count("cost_micro"),
)

rollup_state = Table(
    "rollup_state",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # always 1
    Column("time_zone", Text, nullable=False),  # whose midnight separates the days
    Column("through_day", Text, nullable=False),  # the first day that is not rolled up
)
