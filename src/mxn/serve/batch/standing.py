"""Whether the key that made a batch may still do what the batch does. Blocking; reads only.

A batch outlives the request that made it by up to a day, so nobody else would notice that its key
was revoked meanwhile.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
from sqlalchemy import Connection, select

from mxn.ledger import schema
from mxn.ledger.types import Principal


class Over(msgspec.Struct, frozen=True):
    """Why a batch must stop: what its lines that are not done say."""

    code: str
    message: str


def why_over(
    connection: Connection, principal: Principal, model: str | None, now_us: int
) -> Over | None:
    """Return why `principal`, as it was when the batch was made, has lost its right; None: it has
    not. A key that the ledger does not know is one that was never asked for."""
    row = connection.execute(_query(principal.key_id)).first()
    if row is None:
        return None
    if row.revoked_us is not None and row.revoked_us <= now_us:
        return Over("key_revoked", "the API key of its batch was revoked")
    if row.expires_us is not None and row.expires_us <= now_us:
        return Over("key_expired", "the API key of its batch has expired")
    if not row.is_active:
        return Over("owner_disabled", "the owner of its batch's API key is disabled")
    lost = principal.scopes - frozenset(json.loads(row.scopes))
    if lost:
        text = ", ".join(sorted(lost))
        return Over("key_scope_lost", f"the API key of its batch has no scope {text} any more")
    return _lost_model(principal, row.models, model)


def _lost_model(principal: Principal, text: str | None, model: str | None) -> Over | None:
    """A batch names its model by any of its names, so what matters is what left the key's list."""
    if text is None or model is None:
        return None
    allowed = frozenset(json.loads(text))
    before = principal.models
    is_lost = model not in allowed if before is None else model in before - allowed
    if before is not None and not before & allowed:
        is_lost = True
    if not is_lost:
        return None
    return Over("key_model_lost", f"the API key of its batch may not use {model!r} any more")


def _query(key_id: str) -> Any:
    keys, projects = schema.api_keys, schema.projects
    orgs, users = schema.organizations, schema.users
    is_active = (
        projects.c.is_active & orgs.c.is_active & (keys.c.user_id.is_(None) | users.c.is_active)
    )
    return (
        select(
            keys.c.revoked_us,
            keys.c.expires_us,
            keys.c.scopes,
            keys.c.models,
            is_active.label("is_active"),
        )
        .select_from(keys)
        .join(projects, projects.c.id == keys.c.project_id)
        .join(orgs, orgs.c.id == projects.c.org_id)
        .outerjoin(users, users.c.id == keys.c.user_id)
        .where(keys.c.id == key_id)
    )
