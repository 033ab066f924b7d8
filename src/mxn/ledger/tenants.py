"""Organizations, their projects and users. Functions on a connection; the caller ends the
transaction.

Names are for people and unique (of projects and users: within their organization); ids never
change. Nothing is ever deleted, since usage rows point at it: it is disabled.
"""

from __future__ import annotations

import difflib
import re
import secrets
from typing import Any, NamedTuple

from sqlalchemy import Column, Connection, Table, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from mxn.errors import ConfigError, NotFoundError
from mxn.ledger import schema

DEFAULT_ORG = "org_default"
DEFAULT_PROJECT = "proj_default"
DEFAULT_NAME = "default"

_NAME = re.compile(r"[\w.@+-][\w .@+-]{0,63}")


class Subject(NamedTuple):
    """Whom a limit or a budget is for: `kind` is org, project, user or key."""

    kind: str
    id: str


def new_id(prefix: str) -> str:
    """Return a fresh id such as ``proj_0f3a…`` with 96 random bits."""
    return f"{prefix}_{secrets.token_hex(12)}"


def check_name(name: str, what: str) -> str:
    """Return a name without blanks around it. Raises: ConfigError for one that cannot be named."""
    plain = name.strip()
    if not _NAME.fullmatch(plain):
        raise ConfigError(
            f"{what} {name!r} must have 1 to 64 letters, digits, blanks or any of . _ - @ +"
        )
    return plain


def insert_once(connection: Connection, table: Table, values: dict[str, Any]) -> bool:
    """Insert a row unless an equal key is there; say whether it was new. Safe among processes."""
    make = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    done = connection.execute(make(table).values(**values).on_conflict_do_nothing())
    return done.rowcount == 1


def ensure_default(connection: Connection, *, now_us: int) -> str:
    """Return the id of the project that is used when none is named, made at the first call."""
    shared = {"name": DEFAULT_NAME, "created_us": now_us, "is_active": True}
    insert_once(connection, schema.organizations, {"id": DEFAULT_ORG, **shared})
    project = {"id": DEFAULT_PROJECT, "org_id": DEFAULT_ORG, "weight": 1.0, "priority": 0, **shared}
    insert_once(connection, schema.projects, project)
    return DEFAULT_PROJECT


def create_org(connection: Connection, name: str, *, now_us: int) -> str:
    """Return the id of a new organization. Raises: ConfigError when the name is taken."""
    return _create(connection, schema.organizations, "organization", "org",
                   {"name": name, "created_us": now_us})  # fmt: skip


def create_project(
    connection: Connection, org_id: str, name: str, *, now_us: int, weight: float = 1.0,
    priority: int = 0,
) -> str:  # fmt: skip
    """Return the id of a new project. `weight` is its share when replicas are full; of two
    priorities the smaller runs first. Raises: ConfigError."""
    values = {"org_id": org_id, "name": name, "created_us": now_us, "weight": check_weight(weight),
              "priority": check_priority(priority)}  # fmt: skip
    return _create(connection, schema.projects, "project", "proj", values)


def create_user(connection: Connection, org_id: str, name: str, *, now_us: int) -> str:
    """Return the id of a new user. Raises: ConfigError when the name is taken."""
    values = {"org_id": org_id, "name": name, "created_us": now_us}
    return _create(connection, schema.users, "user", "user", values)


def check_weight(weight: float) -> float:
    if not 0.001 <= weight <= 1000:
        raise ConfigError(f"weight must be from 0.001 to 1000, got {weight}")
    return weight


def check_priority(priority: int) -> int:
    if not -1000 <= priority <= 1000:
        raise ConfigError(f"priority must be from -1000 to 1000, got {priority}")
    return priority


def change_project(connection: Connection, project_id: str, **values: float | int) -> None:
    """Set `weight` and `priority` of a project. Raises: ConfigError."""
    if "weight" in values:
        check_weight(values["weight"])
    if "priority" in values:
        check_priority(int(values["priority"]))
    projects = schema.projects
    connection.execute(update(projects).where(projects.c.id == project_id).values(**values))


def set_active(connection: Connection, table: Table, row_id: str, is_active: bool) -> None:
    """Disable or enable an organization, project or user: keys of a disabled one are refused."""
    connection.execute(update(table).where(table.c.id == row_id).values(is_active=is_active))


def find_org(connection: Connection, text: str) -> Any:
    """Return the row of an organization by id or name. Raises: NotFoundError."""
    return _find(connection, schema.organizations, "organization", text)


def find_project(connection: Connection, text: str) -> Any:
    """Return the row of a project by id, ``org/name`` or a name that only one has.

    Raises: NotFoundError.
    """
    return _find_within_org(connection, schema.projects, "project", text)


def find_user(connection: Connection, text: str) -> Any:
    """Return the row of a user by id, ``org/name`` or a name that only one has.

    Raises: NotFoundError.
    """
    return _find_within_org(connection, schema.users, "user", text)


def list_rows(connection: Connection, table: Table, org_id: str | None = None) -> list[Any]:
    """Return rows of organizations, projects or users, of one organization or all, by name."""
    query = select(table).order_by(table.c.name, table.c.id)
    if org_id is not None:
        query = query.where(table.c.org_id == org_id)
    return list(connection.execute(query))


def names_of(connection: Connection, table: Table) -> dict[str, str]:
    """Return id -> name of all rows of a table."""
    found = connection.execute(select(table.c.id, table.c.name))
    return {row.id: row.name for row in found}


def _create(
    connection: Connection, table: Table, what: str, prefix: str, values: dict[str, Any]
) -> str:
    name = check_name(values["name"], what)
    if name.startswith(f"{prefix}_"):
        raise ConfigError(f"{what} {name!r} looks like an id: it may not begin with {prefix}_")
    if "/" in name:
        raise ConfigError(f"{what} {name!r} may not contain a slash")
    same = select(table.c.id).where(table.c.name == name)
    if "org_id" in values:
        same = same.where(table.c.org_id == values["org_id"])
    if connection.execute(same).first() is not None:
        raise ConfigError(f"{what} {name!r} exists already")
    row_id = new_id(prefix)
    connection.execute(insert(table).values(**values | {"id": row_id, "name": name,
                                                        "is_active": True}))  # fmt: skip
    return row_id


def _find(connection: Connection, table: Table, what: str, text: str) -> Any:
    named: Column[Any] = table.c.name
    row = connection.execute(select(table).where((table.c.id == text) | (named == text))).first()
    if row is None:
        raise _missing(what, text, list(connection.execute(select(named)).scalars()))
    return row


def _find_within_org(connection: Connection, table: Table, what: str, text: str) -> Any:
    org, slash, name = text.rpartition("/")
    query = select(table).where((table.c.id == text) | (table.c.name == name))
    if slash:
        org_id = find_org(connection, org).id
        query = select(table).where(table.c.org_id == org_id, table.c.name == name)
    rows = list(connection.execute(query))
    if not rows:
        raise _missing(what, text, list(connection.execute(select(table.c.name)).scalars()))
    if len(rows) > 1:
        raise NotFoundError(
            f"{len(rows)} organizations have a {what} {text!r}", hint=f"write ORG/{text}"
        )
    return rows[0]


def _missing(what: str, text: str, names: list[str]) -> NotFoundError:
    near = difflib.get_close_matches(text, names, n=1)
    if near:
        return NotFoundError(f"no {what} {text!r}", hint=f"did you mean {near[0]!r}?")
    shown = ", ".join(sorted(names)[:8]) or "none yet"
    return NotFoundError(f"no {what} {text!r}; there are: {shown}")
