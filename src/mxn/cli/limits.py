"""`mxn limit` and `mxn budget`: how much somebody may use per minute, and in all."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mxn.cli.ledger import (
    DatabaseUrl,
    Key,
    Org,
    Project,
    User,
    Yes,
    confirm,
    find_subject,
    print_json,
    print_table,
    reading,
    transaction,
)  # fmt: skip
from mxn.cli.options import Json

limit = typer.Typer(help="Rate limits per minute.", no_args_is_help=True)
budget = typer.Typer(help="Budgets in tokens or money.", no_args_is_help=True)


@limit.command("set")
def set_limit(
    per_minute: Annotated[int, typer.Option(help="How many in a minute.")],
    kind: Annotated[str, typer.Option(help="requests, input_tokens, output_tokens.")] = "requests",
    model: Annotated[str, typer.Option(help="Of this model only.")] = "",
    org: Org = "", project: Project = "", user: User = "", key: Key = "",
    database: DatabaseUrl = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Set or change a limit of one organization, project, user or key."""
    from mxn.ledger import limits, tenants
    from mxn.ledger.moments import now_us

    with transaction(database) as connection:
        tenants.ensure_default(connection, now_us=now_us())
        whom = find_subject(connection, org, project, user, key)
        made = limits.set_limit(connection, whom, kind, per_minute, model=model)
    _made(made, as_json)


@limit.command("list")
def list_limits(database: DatabaseUrl = "", as_json: Json = False) -> None:
    """List limits."""
    from mxn.ledger import limits

    with reading(database) as connection:
        rows = [dict(row._mapping) for row in limits.list_limits(connection)]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("limit", "of", "id of owner", "model", "kind", "per minute"),
        [(row["id"], row["subject_kind"], row["subject_id"], row["model"] or "any", row["kind"],
          f"{row['per_minute']:,}") for row in rows],
        numbers=("per minute",), empty="no limit is set",
    )  # fmt: skip


@limit.command("remove")
def remove_limit(
    limit_id: Annotated[str, typer.Argument(metavar="LIMIT")], yes: Yes = False,
    database: DatabaseUrl = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Lift a limit."""
    from mxn.ledger import limits

    confirm(f"Lift {limit_id}?", yes)
    with transaction(database) as connection:
        limits.remove_limit(connection, limit_id)
    _made(limit_id, as_json)


@budget.command("set")
def set_budget(
    money: Annotated[str, typer.Option("--limit", help="Money, such as 10.50.")] = "",
    currency: Annotated[str, typer.Option(help="Of the money, such as USD.")] = "USD",
    tokens: Annotated[int | None, typer.Option(help="Tokens instead of money.")] = None,
    period: Annotated[str, typer.Option(help="total, day or month.")] = "total",
    org: Org = "", project: Project = "", user: User = "", key: Key = "",
    database: DatabaseUrl = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Set or change a budget of one organization, project, user or key."""
    from mxn.errors import ConfigError
    from mxn.ledger import budget_admin, tenants
    from mxn.ledger.moments import now_us
    from mxn.ledger.money import parse_money

    if bool(money) == (tokens is not None):
        raise ConfigError("give either --limit with money, or --tokens")
    with transaction(database) as connection:
        tenants.ensure_default(connection, now_us=now_us())
        whom = find_subject(connection, org, project, user, key)
        made = budget_admin.set_budget(
            connection, whom, period=period, now_us=now_us(),
            limit_amount=parse_money(money, what="--limit") if tokens is None else tokens,
            currency=currency if tokens is None else None,
        )  # fmt: skip
    _made(made, as_json)


@budget.command("list")
def list_budgets(database: DatabaseUrl = "", as_json: Json = False) -> None:
    """List budgets with what is spent, reserved and left of the latest period."""
    from mxn.ledger import budget_admin
    from mxn.ledger.moments import format_us

    with reading(database) as connection:
        rows = budget_admin.list_budgets(connection)
    if as_json:
        print_json(rows)
        return
    amounts = ("limit_amount", "spent", "reserved", "left")
    print_table(
        ("budget", "of", "id of owner", "period", "since", "limit", "spent", "reserved", "left"),
        [(row["id"], row["subject_kind"], row["subject_id"], row["period"],
          format_us(row["period_start"] or None) or "ever",
          *(_amount(row, name) for name in amounts))
         for row in rows],
        numbers=("limit", "spent", "reserved", "left"), empty="no budget is set",
    )  # fmt: skip


@budget.command("remove")
def remove_budget(
    budget_id: Annotated[str, typer.Argument(metavar="BUDGET")], yes: Yes = False,
    database: DatabaseUrl = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Lift a budget; what was spent stays known."""
    from mxn.ledger import budget_admin

    confirm(f"Lift {budget_id}?", yes)
    with transaction(database) as connection:
        budget_admin.remove_budget(connection, budget_id)
    _made(budget_id, as_json)


def _amount(row: dict[str, Any], name: str) -> str:
    from mxn.ledger.money import format_money

    if row["unit"] == "tokens":
        return f"{row[name]:,} tokens"
    return format_money(row[name], row["currency"])


def _made(row_id: str, as_json: bool) -> None:
    if as_json:
        print_json({"id": row_id})
    else:
        typer.echo(row_id)
