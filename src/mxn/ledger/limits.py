"""Rate limits as an administrator sets them. Functions on a connection; `open` enforces them."""

from __future__ import annotations

from typing import Any, Literal, get_args

from sqlalchemy import Connection, insert, select, update

from mxn.errors import ConfigError, NotFoundError
from mxn.ledger import schema
from mxn.ledger.tenants import Subject, new_id

LimitKind = Literal["requests", "input_tokens", "output_tokens"]
LIMIT_KINDS: tuple[LimitKind, ...] = get_args(LimitKind)
ANY_MODEL = ""
_MAX_PER_MINUTE = 10**12


def set_limit(
    connection: Connection, subject: Subject, kind: str, per_minute: int, *, model: str = ANY_MODEL
) -> str:
    """Return the id of a limit per minute, made or changed. `model` "": all models together.

    Raises: ConfigError for a kind or an amount that cannot be.
    """
    if kind not in LIMIT_KINDS:
        raise ConfigError(f"a limit is on one of {', '.join(LIMIT_KINDS)}, got {kind!r}")
    if not 0 <= per_minute <= _MAX_PER_MINUTE:
        raise ConfigError(f"a limit must be from 0 to {_MAX_PER_MINUTE}, got {per_minute}")
    table = schema.rate_limits
    same = (
        (table.c.subject_kind == subject.kind) & (table.c.subject_id == subject.id)
        & (table.c.model == model) & (table.c.kind == kind)
    )  # fmt: skip
    known = connection.execute(select(table.c.id).where(same)).scalar()
    if known is not None:
        change = update(table).where(table.c.id == known)
        connection.execute(change.values(per_minute=per_minute, is_active=True))
        return str(known)
    values = {
        "id": new_id("limit"), "subject_kind": subject.kind, "subject_id": subject.id,
        "model": model, "kind": kind, "per_minute": per_minute, "is_active": True,
    }  # fmt: skip
    connection.execute(insert(table).values(**values))
    return values["id"]


def list_limits(connection: Connection) -> list[Any]:
    """Return the rows of all limits that are in force."""
    table = schema.rate_limits
    query = select(table).where(table.c.is_active).order_by(
        table.c.subject_kind, table.c.subject_id, table.c.model, table.c.kind
    )  # fmt: skip
    return list(connection.execute(query))


def remove_limit(connection: Connection, limit_id: str) -> None:
    """Lift a limit. Raises: NotFoundError."""
    table = schema.rate_limits
    change = update(table).where(table.c.id == limit_id, table.c.is_active)
    if connection.execute(change.values(is_active=False)).rowcount != 1:
        raise NotFoundError(f"no limit {limit_id!r}", hint="`mxn limit list` shows them")
