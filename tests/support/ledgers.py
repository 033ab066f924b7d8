"""A tenant with limits, budgets and prices in a real ledger, and what tests ask of it."""

from __future__ import annotations

import asyncio
import itertools
import os
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select

from mxn.ledger import budget_admin, keys, limits, prices, schema, tenants
from mxn.ledger.database import Database
from mxn.ledger.moments import now_us
from mxn.ledger.prices import NewPrice
from mxn.ledger.sql_ledger import SqlLedger
from mxn.ledger.types import OpenUsage, Principal, Settlement, Ticket

_numbers = itertools.count()


@dataclass
class Tenant:
    database: Database
    principal: Principal
    key: str

    def budget(self, amount: int, *, currency: str | None = None, period: str = "total") -> str:
        with self.database.begin() as connection:
            return budget_admin.set_budget(
                connection, tenants.Subject("project", self.principal.project_id),
                limit_amount=amount, period=period, now_us=now_us(), currency=currency,
            )  # fmt: skip

    def limit(self, kind: str, per_minute: int, model: str = "") -> str:
        subject = tenants.Subject("org", self.principal.org_id)
        with self.database.begin() as connection:
            return limits.set_limit(connection, subject, kind, per_minute, model=model)

    def price(
        self, kind: str, micro: int, *, model: str = "*", chip: str = "*", currency: str = "USD"
    ) -> None:
        now = now_us()
        price = NewPrice(model=model, chip=chip, kind=kind, micro_per_million=micro,
                         currency=currency, valid_from_us=now)  # fmt: skip
        with self.database.begin() as connection:
            prices.set_prices(connection, [price], now_us=now)

    def usage(self, input_tokens: int = 10, output: int = 20, **more: Any) -> OpenUsage:
        values: dict[str, Any] = {
            "usage_id": f"chatcmpl-{os.getpid()}-{next(_numbers)}", "request_id": "req_1",
            "principal": self.principal, "endpoint": "chat", "model": "m", "chips": ("cpu",),
            "input_tokens": input_tokens, "max_output_tokens": output,
        }  # fmt: skip
        return OpenUsage(**(values | more))


def make_tenant(database: Database, name: str = "default") -> Tenant:
    with database.begin() as connection:
        org = tenants.create_org(connection, name, now_us=now_us())
        project = tenants.create_project(connection, org, "p", now_us=now_us())
        key_id, key = keys.create_key(
            connection, project, name="k", now_us=now_us(), scopes=(*keys.DEFAULT_SCOPES, "admin")
        )
    return Tenant(database, Principal(key_id=key_id, org_id=org, project_id=project), key)


def complete(input_tokens: int = 10, output: int = 20, **more: Any) -> Settlement:
    values = {"reason": "complete", "chip": "cpu", "input_tokens": input_tokens,
              "output_tokens": output}  # fmt: skip
    return Settlement(**(values | more))


def row_of(database: Database, usage_id: str) -> Any:
    with database.read() as connection:
        return connection.execute(
            select(schema.usage).where(schema.usage.c.id == usage_id)
        ).one_or_none()


def period_of(database: Database, budget_id: str) -> tuple[int, int]:
    """Return (reserved, spent) of a budget over all its periods."""
    table = schema.budget_periods
    query = select(func.sum(table.c.reserved), func.sum(table.c.spent))
    with database.read() as connection:
        reserved, spent = connection.execute(query.where(table.c.budget_id == budget_id)).one()
    return int(reserved or 0), int(spent or 0)


def count_rows(database: Database, **where: Any) -> int:
    query = select(func.count()).select_from(schema.usage)
    for name, value in where.items():
        query = query.where(schema.usage.c[name] == value)
    with database.read() as connection:
        return int(connection.execute(query).scalar_one())


async def try_open(ledger: SqlLedger, usage: OpenUsage) -> Ticket | Exception:
    try:
        return await ledger.open(usage)
    except Exception as error:
        return error


async def open_many(ledger: SqlLedger, tenant: Tenant, num: int) -> list[Ticket | Exception]:
    return list(await asyncio.gather(*(try_open(ledger, tenant.usage()) for _ in range(num))))
