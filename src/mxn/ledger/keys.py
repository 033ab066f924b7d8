"""API keys: made, imported, listed, revoked, rotated. Functions on a connection; the caller ends
the transaction.

A key is 256 random bits behind ``sk-``. The database holds its SHA-256 and the first characters
for display; the key itself is returned once, to whom it is made for, and is nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable
from typing import Any, get_args

from sqlalchemy import Connection, insert, select, update

from mxn.errors import ConfigError, NotFoundError
from mxn.ledger import schema, tenants
from mxn.ledger.moments import iso, now_us
from mxn.ledger.types import Scope

SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_SCOPES: tuple[Scope, ...] = ("inference", "batch")
PREFIX_CHARS = 11  # "sk-" and 8 of 43 random characters: enough to tell keys apart
LOCAL_KEY_NAME = "this machine"


def new_key() -> str:
    """Return a fresh key: ``sk-`` and 256 random bits."""
    return f"sk-{secrets.token_urlsafe(32)}"


def digest(key: str) -> str:
    """Return what the ledger keeps of a key: the SHA-256 of its text, as hex digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def encode_list(values: Iterable[str]) -> str:
    """Return the text of the columns `scopes` and `models`: a sorted JSON list."""
    return json.dumps(sorted(set(values)))


def decode_list(text: str) -> frozenset[str]:
    return frozenset(json.loads(text))


def check_scopes(scopes: Iterable[str]) -> tuple[str, ...]:
    """Return scopes without doubles. Raises: ConfigError for none, or one that is not known."""
    wanted = tuple(dict.fromkeys(scopes))
    unknown = [scope for scope in wanted if scope not in SCOPES]
    if unknown or not wanted:
        raise ConfigError(f"scopes must be some of {', '.join(SCOPES)}, got {unknown or 'none'}")
    return wanted


def create_key(
    connection: Connection,
    project_id: str,
    *,
    name: str,
    now_us: int,
    user_id: str | None = None,
    scopes: Iterable[str] = DEFAULT_SCOPES,
    models: Iterable[str] | None = None,
    expires_us: int | None = None,
) -> tuple[str, str]:
    """Return (id, key) of a new key. `models` None: every model.

    Raises: ConfigError for a name, a scope or an end that cannot be.
    """
    if expires_us is not None and expires_us <= now_us:
        raise ConfigError(f"a key must end in the future, got {iso(expires_us)}")
    allowed = None if models is None else list(models)
    if allowed == []:
        raise ConfigError("a key with an empty list of models could do nothing")
    values = {
        "project_id": project_id,
        "user_id": user_id,
        "name": tenants.check_name(name, "key name"),
        "scopes": encode_list(check_scopes(scopes)),
        "models": None if allowed is None else encode_list(allowed),
        "expires_us": expires_us,
    }
    key = new_key()
    return _insert(connection, key, values, now_us), key


def import_key(database: Any, key: str, *, name: str = LOCAL_KEY_NAME) -> str:
    """Return the id of the row of a key that was made elsewhere, such as that of `mxn up`.

    Idempotent and safe among processes: a key that is known keeps its row, also a revoked one. A
    new one gets every scope but `replica` in the default project. `database` has `begin()`.
    Raises: ConfigError for an empty key.
    """
    if not key.strip():
        raise ConfigError("the API key is empty")
    now = now_us()
    with database.begin() as connection:
        project_id = tenants.ensure_default(connection, now_us=now)
        values = {
            "id": tenants.new_id("key"),
            "project_id": project_id,
            "name": name,
            "prefix": display_prefix(key),
            "digest": digest(key),
            "scopes": encode_list(("inference", "batch", "admin")),
            "created_us": now,
        }
        tenants.insert_once(connection, schema.api_keys, values)
        known = select(schema.api_keys.c.id).where(schema.api_keys.c.digest == digest(key))
        return str(connection.execute(known).scalar_one())


def display_prefix(key: str) -> str:
    """Return the part of a key that is kept to tell it apart: never more than a quarter of it."""
    return key[: min(PREFIX_CHARS, len(key) // 4)]


def find_key(connection: Connection, text: str) -> Any:
    """Return the row of a key by id, name, shown beginning or the key itself.

    Raises: NotFoundError where none or several fit.
    """
    keys = schema.api_keys
    fits = (keys.c.id == text) | (keys.c.name == text) | (keys.c.prefix == text)
    rows = list(connection.execute(select(keys).where(fits | (keys.c.digest == digest(text)))))
    living = [row for row in rows if row.revoked_us is None]
    if len(rows) > 1 and len(living) == 1:
        rows = living
    if not rows:
        shown = text if len(text) < 24 else text[:PREFIX_CHARS] + "…"
        raise NotFoundError(f"no key {shown!r}", hint="`mxn keys list` shows them")
    if len(rows) > 1:
        raise NotFoundError(
            f"{len(rows)} keys are called {text!r}: {', '.join(row.id for row in rows)}",
            hint="name one by its id",
        )
    return rows[0]


def list_keys(
    connection: Connection, *, project_id: str | None = None, user_id: str | None = None
) -> list[Any]:
    """Return the rows of keys, newest first."""
    keys = schema.api_keys
    query = select(keys).order_by(keys.c.created_us.desc(), keys.c.id)
    if project_id is not None:
        query = query.where(keys.c.project_id == project_id)
    if user_id is not None:
        query = query.where(keys.c.user_id == user_id)
    return list(connection.execute(query))


def state(row: Any, now_us: int) -> str:
    """Return what a key is good for now: active, ending, expired or revoked."""
    if row.revoked_us is not None and row.revoked_us <= now_us:
        return "revoked"
    if row.expires_us is not None and row.expires_us <= now_us:
        return "expired"
    return "ending" if row.replaced_by else "active"


def revoke_key(connection: Connection, key_id: str, *, now_us: int) -> bool:
    """End a key at once; False when it was revoked before (the first time stays)."""
    keys = schema.api_keys
    change = update(keys).where(keys.c.id == key_id, keys.c.revoked_us.is_(None))
    return connection.execute(change.values(revoked_us=now_us)).rowcount == 1


def rotate_key(
    connection: Connection, row: Any, *, now_us: int, grace_us: int
) -> tuple[str, str, int]:
    """Return (id, key, end of the old key in µs) of a new key with the same rights and end.

    The old one goes on for `grace_us`, but never longer than it would have.
    Raises: ConfigError for a key that is over, or has been rotated already.
    """
    if state(row, now_us) != "active":
        raise ConfigError(f"key {row.id} cannot be rotated: it is {state(row, now_us)}")
    ends_us = min(now_us + grace_us, row.expires_us or now_us + grace_us)
    key = new_key()
    kept = ("project_id", "user_id", "name", "scopes", "models", "expires_us")
    key_id = _insert(connection, key, {name: getattr(row, name) for name in kept}, now_us)
    keys = schema.api_keys
    change = update(keys).where(
        keys.c.id == row.id, keys.c.replaced_by.is_(None), keys.c.revoked_us.is_(None)
    )
    done = connection.execute(change.values(expires_us=ends_us, replaced_by=key_id))
    if done.rowcount != 1:  # another process was first; the caller rolls the new key back
        raise ConfigError(f"key {row.id} was rotated or revoked just now")
    return key_id, key, ends_us


def _insert(connection: Connection, key: str, values: dict[str, Any], now_us: int) -> str:
    key_id = tenants.new_id("key")
    made = {"id": key_id, "prefix": display_prefix(key), "digest": digest(key),
            "created_us": now_us}  # fmt: skip
    connection.execute(insert(schema.api_keys).values(**values, **made))
    return key_id
