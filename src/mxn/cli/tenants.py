"""`mxn org`, `mxn project`, `mxn user`: who may use the platform."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mxn.cli.ledger import (
    DatabaseUrl,
    Org,
    Yes,
    confirm,
    print_json,
    print_table,
    reading,
    transaction,
)
from mxn.cli.options import Json

orgs = typer.Typer(help="Organizations.", no_args_is_help=True)
projects = typer.Typer(help="Projects: their share and priority.", no_args_is_help=True)
users = typer.Typer(help="Users of an organization.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name, or ORG/NAME, or id.")]
Weight = Annotated[float | None, typer.Option(help="Share among projects when replicas are full.")]
Priority = Annotated[int | None, typer.Option(help="The smaller runs first.")]


@orgs.command("create")
def create_org(name: Name, database: DatabaseUrl = "", as_json: Json = False) -> None:
    """Make an organization."""
    from mxn.ledger import tenants
    from mxn.ledger.moments import now_us

    with transaction(database) as connection:
        made = tenants.create_org(connection, name, now_us=now_us())
    _made(made, as_json)


@projects.command("create")
def create_project(
    name: Name, org: Org = "default", weight: Weight = None, priority: Priority = None,
    database: DatabaseUrl = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Make a project."""
    from mxn.ledger import tenants
    from mxn.ledger.moments import now_us

    now = now_us()
    with transaction(database) as connection:
        tenants.ensure_default(connection, now_us=now)
        made = tenants.create_project(
            connection, tenants.find_org(connection, org).id, name, now_us=now,
            weight=1.0 if weight is None else weight, priority=priority or 0,
        )  # fmt: skip
    _made(made, as_json)


@projects.command("set")
def set_project(
    name: Name, weight: Weight = None, priority: Priority = None, database: DatabaseUrl = "",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Change share and priority of a project."""
    from mxn.errors import ConfigError
    from mxn.ledger import tenants

    given = {"weight": weight, "priority": priority}
    values = {key: value for key, value in given.items() if value is not None}
    if not values:
        raise ConfigError("nothing to change: give --weight or --priority")
    with transaction(database) as connection:
        row = tenants.find_project(connection, name)
        tenants.change_project(connection, row.id, **values)
    _made(row.id, as_json)


@users.command("create")
def create_user(
    name: Name, org: Org = "default", database: DatabaseUrl = "", as_json: Json = False
) -> None:
    """Make a user."""
    from mxn.ledger import tenants
    from mxn.ledger.moments import now_us

    now = now_us()
    with transaction(database) as connection:
        tenants.ensure_default(connection, now_us=now)
        made = tenants.create_user(
            connection, tenants.find_org(connection, org).id, name, now_us=now
        )
    _made(made, as_json)


def _add_common(app: typer.Typer, what: str) -> None:
    """Add list, disable and enable, which are the same for all three."""

    @app.command("list")
    def list_(database: DatabaseUrl = "", as_json: Json = False) -> None:
        from mxn.ledger import schema, tenants

        with reading(database) as connection:
            rows = tenants.list_rows(connection, schema.metadata.tables[f"{what}s"])
            names = tenants.names_of(connection, schema.organizations)
        found = [dict(row._mapping) for row in rows]
        if as_json:
            print_json(found)
        else:
            _print(found, names, f"no {what} yet")

    @app.command("disable")
    def disable(
        name: Name, yes: Yes = False, database: DatabaseUrl = "", as_json: Json = False
    ) -> None:
        confirm(f"Disable {what} {name}? Its keys will be refused.", yes)
        _set_active(what, name, False, database, as_json)

    @app.command("enable")
    def enable(name: Name, database: DatabaseUrl = "", as_json: Json = False) -> None:
        _set_active(what, name, True, database, as_json)

    list_.__doc__ = f"List every {what}."
    disable.__doc__ = f"Refuse the keys of this {what}; nothing is deleted."
    enable.__doc__ = f"Undo `disable` of this {what}."
    for command in app.registered_commands[-3:]:
        command.help = command.callback.__doc__ if command.callback else None


def _set_active(what: str, name: str, is_active: bool, database: str, as_json: bool) -> None:
    from mxn.ledger import schema, tenants

    find = {"organization": tenants.find_org, "project": tenants.find_project,
            "user": tenants.find_user}[what]  # fmt: skip
    with transaction(database) as connection:
        row = find(connection, name)
        tenants.set_active(connection, schema.metadata.tables[f"{what}s"], row.id, is_active)
    _made(row.id, as_json)


def _made(row_id: str, as_json: bool) -> None:
    if as_json:
        print_json({"id": row_id})
    else:
        typer.echo(row_id)


def _print(rows: list[dict[str, Any]], orgs: dict[str, str], empty: str) -> None:
    hidden = ("created_us", "is_active")
    head = [name for name in (rows[0] if rows else {}) if name not in hidden]
    titles = ["organization" if name == "org_id" else name for name in head]
    print_table(
        [*titles, "state"],
        [[orgs.get(str(row[name]), row[name]) if name == "org_id" else row[name] for name in head]
         + ["active" if row["is_active"] else "disabled"] for row in rows],
        numbers=("weight", "priority"), empty=empty,
    )  # fmt: skip


for _app, _what in ((orgs, "organization"), (projects, "project"), (users, "user")):
    _add_common(_app, _what)
