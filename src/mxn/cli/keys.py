"""`mxn keys`: API keys of callers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mxn.cli.ledger import (
    DatabaseUrl,
    Project,
    User,
    Yes,
    confirm,
    print_json,
    print_table,
    reading,
    transaction,
)  # fmt: skip
from mxn.cli.options import Json

app = typer.Typer(help="API keys: create, list, rotate, revoke.", no_args_is_help=True)
WhichKey = Annotated[str, typer.Argument(metavar="KEY", help="Id, name or shown beginning.")]


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What it is for.")] = "key",
    project: Project = "",
    user: User = "",
    scope: Annotated[
        list[str] | None, typer.Option(help="inference, batch, replica, admin; may be repeated.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Only this model; may be repeated.")
    ] = None,
    expires: Annotated[str, typer.Option(help="Ends after, such as 30d; by default never.")] = "",
    database: DatabaseUrl = "",
    as_json: Json = False,
) -> None:
    """Make a key, and print it this once: it is not kept."""
    from mxn.errors import ConfigError
    from mxn.ledger import keys, tenants
    from mxn.ledger.moments import now_us, parse_duration

    now = now_us()
    with transaction(database) as connection:
        default = tenants.ensure_default(connection, now_us=now)
        owner = tenants.find_project(connection, project or default)
        person = tenants.find_user(connection, user) if user else None
        if person is not None and person.org_id != owner.org_id:
            raise ConfigError(f"user {user!r} is not of the organization of the project")
        key_id, key = keys.create_key(
            connection, owner.id, name=name, now_us=now, models=model,
            user_id=person.id if person is not None else None,
            scopes=scope or keys.DEFAULT_SCOPES,
            expires_us=now + parse_duration(expires) if expires else None,
        )  # fmt: skip
    _show_new(key_id, key, as_json)


@app.command("list")
def list_(
    project: Project = "",
    user: User = "",
    every: Annotated[bool, typer.Option("--all", help="Also revoked and expired ones.")] = False,
    database: DatabaseUrl = "",
    as_json: Json = False,
) -> None:
    """List keys, newest first."""
    from mxn.ledger import keys, schema, tenants
    from mxn.ledger.moments import format_us, now_us

    now = now_us()
    with reading(database) as connection:
        rows = keys.list_keys(
            connection,
            project_id=tenants.find_project(connection, project).id if project else None,
            user_id=tenants.find_user(connection, user).id if user else None,
        )
        projects = tenants.names_of(connection, schema.projects)
    found = [_as_dict(row, now) for row in rows]
    shown = [row for row in found if every or row["state"] in ("active", "ending")]
    if as_json:
        print_json(shown)
        return
    print_table(
        ("key", "name", "begins", "project", "scopes", "models", "state", "expires", "last used"),
        [(row["id"], row["name"], row["prefix"] + "…", projects.get(row["project_id"], "?"),
          ",".join(row["scopes"]), ",".join(row["models"]) if row["models"] else "any",
          row["state"], format_us(row["expires_us"]) or "never", format_us(row["last_used_us"]))
         for row in shown],
        empty="no key yet; `mxn keys create` makes one",
    )  # fmt: skip


@app.command("rotate")
def rotate(
    key: WhichKey,
    grace: Annotated[str, typer.Option(help="How long the old one goes on.")] = "1h",
    database: DatabaseUrl = "",
    as_json: Json = False,
) -> None:
    """Make a key with the same rights; the old one ends after the grace."""
    from mxn.ledger import keys
    from mxn.ledger.moments import iso, now_us, parse_duration

    with transaction(database) as connection:
        old = keys.find_key(connection, key)
        key_id, made, ends = keys.rotate_key(
            connection, old, now_us=now_us(), grace_us=parse_duration(grace)
        )
    _show_new(key_id, made, as_json, replaces=old.id, old_ends=iso(ends))


@app.command("revoke")
def revoke(
    key: WhichKey, yes: Yes = False, database: DatabaseUrl = "", as_json: Json = False
) -> None:
    """End a key at once and for ever."""
    from mxn.ledger import keys
    from mxn.ledger.moments import now_us

    with transaction(database) as connection:
        row = keys.find_key(connection, key)
    confirm(f"Revoke {row.id} ({row.name}, {row.prefix}…)?", yes)
    with transaction(database) as connection:
        is_new = keys.revoke_key(connection, row.id, now_us=now_us())
    if as_json:
        print_json({"id": row.id, "revoked": True, "is_new": is_new})
    else:
        typer.echo(f"{row.id} {'is revoked' if is_new else 'was revoked before'}")


def _show_new(key_id: str, key: str, as_json: bool, **more: str | None) -> None:
    if as_json:
        print_json({"id": key_id, "key": key} | more)
        return
    typer.echo(key)
    typer.echo(f"id {key_id}; keep the key: it is shown only now", err=True)
    if more:
        typer.echo(f"{more['replaces']} ends at {more['old_ends']}", err=True)


def _as_dict(row: Any, now_us: int) -> dict[str, Any]:
    from mxn.ledger import keys

    values = dict(row._mapping)
    del values["digest"]
    values["scopes"] = sorted(keys.decode_list(row.scopes))
    values["models"] = None if row.models is None else sorted(keys.decode_list(row.models))
    return values | {"state": keys.state(row, now_us)}
