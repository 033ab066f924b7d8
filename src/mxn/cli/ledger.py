"""What the commands of the ledger share: which database, whose limit, and how it is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxn.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from mxn.ledger.tenants import Subject

DatabaseUrl = Annotated[
    str,
    typer.Option(
        "--database", metavar="URL", help="Ledger, such as sqlite:///FILE or postgresql://…; "
        "by default MXN_DATABASE, then MXN_HOME/ledger.db.",
    ),
]  # fmt: skip
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Org = Annotated[str, typer.Option("--org", help="Organization: name or id.")]
Project = Annotated[str, typer.Option("--project", help="Project: NAME, ORG/NAME or id.")]
User = Annotated[str, typer.Option("--user", help="User: NAME, ORG/NAME or id.")]
Key = Annotated[str, typer.Option("--key", help="Key: id, name or shown beginning.")]


@contextmanager
def transaction(url: str) -> Iterator[Connection]:
    """Open the ledger, made and migrated if needed; what was done is kept unless an error rises."""
    from mxn.ledger.database import Database

    database = Database.open(url or None)
    try:
        with database.begin() as connection:
            yield connection
    finally:
        database.close()


@contextmanager
def reading(url: str) -> Iterator[Connection]:
    """Open the ledger to read one state of it, which keeps no gateway waiting."""
    from mxn.ledger.database import Database

    database = Database.open(url or None)
    try:
        with database.read() as connection:
            yield connection
    finally:
        database.close()


def find_subject(connection: Connection, org: str, project: str, user: str, key: str) -> Subject:
    """Return whom exactly one of four options names. Raises: ConfigError, NotFoundError."""
    from mxn.ledger import keys, tenants

    given = {"org": org, "project": project, "user": user, "key": key}
    named = [kind for kind, text in given.items() if text]
    if len(named) != 1:
        raise ConfigError("name exactly one of --org, --project, --user and --key")
    find = {"org": tenants.find_org, "project": tenants.find_project, "user": tenants.find_user,
            "key": keys.find_key}[named[0]]  # fmt: skip
    return tenants.Subject(named[0], find(connection, given[named[0]]).id)


def filters(connection: Connection, org: str, project: str, user: str, key: str) -> dict[str, str]:
    """Return columns of usage and what they must be."""
    given = {"org": org, "project": project, "user": user, "key": key}
    return {
        f"{kind}_id": find_subject(connection, **{k: v if k == kind else "" for k, v in
                                                  given.items()}).id
        for kind, text in given.items()
        if text
    }  # fmt: skip


def confirm(question: str, yes: bool) -> None:
    """Ask on the terminal. Raises: ConfigError where nobody can answer; ends on a no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} Nobody can answer here", hint="add --yes")
    if not typer.confirm(question):
        raise typer.Exit(1)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: Sequence[str] = (),
    empty: str = "", foot: Sequence[Any] = (),
) -> None:  # fmt: skip
    """Print a table; columns in `numbers` are right-aligned, `foot` is a last line of totals."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        print(empty, file=sys.stderr)
        return
    table = Table(box=None, header_style="bold", show_footer=bool(foot), footer_style="bold")
    for index, title in enumerate(head):
        table.add_column(
            title, no_wrap=True, justify="right" if title in numbers else "left",
            footer=str(foot[index]) if foot else "",
        )  # fmt: skip
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    # A file or a pipe has no width: what is copied is never cut there.
    Console(width=None if sys.stdout.isatty() else 250).print(table)
