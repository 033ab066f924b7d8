"""What is in force: keys, limits, budgets and prices, as one gateway holds them in memory.

A `Rules` is one state of the database, never changed; `load` reads it, `RulesCache` keeps it fresh
by the counter that triggers move at each change. Decides nothing: reservations are made in SQL.
"""

from __future__ import annotations

import bisect
import json
import threading
import time
from collections import defaultdict
from typing import Any, NamedTuple

from sqlalchemy import Connection, select

from mxn.errors import ConfigError
from mxn.ledger import schema
from mxn.ledger.bounds import MAX_COST_MICRO
from mxn.ledger.database import Database
from mxn.ledger.prices import load_prices
from mxn.ledger.pricing import ANY, KINDS, Applied, Price, choose_all, currency_of, encode_applied
from mxn.ledger.types import OpenUsage, Principal, Settlement

_MAX_MEMO = 10_000  # combinations of subjects and models; more start anew


class Limit(NamedTuple):
    id: str
    subject: str  # such as "project proj_1", for messages
    model: str
    kind: Any
    per_minute: int


class Budget(NamedTuple):
    id: str
    subject: str
    unit: str
    currency: str
    period: str
    limit_amount: int


class Tariff(NamedTuple):
    """The prices of a model on a chip at a time: micro per million for each of `pricing.KINDS`."""

    rates: tuple[int, ...]
    currency: str
    text: str  # what a usage row keeps

    def cost(self, used: Settlement) -> int:
        """Return micro-units, as `pricing.cost` does; a test compares the two."""
        plain, cached, output, reasoning, request, device = self.rates
        exact = (
            (used.input_tokens - used.cached_tokens) * plain
            + used.cached_tokens * cached
            + (used.output_tokens - used.reasoning_tokens) * output
            + used.reasoning_tokens * reasoning
            + request
            + used.device_us * device
        )
        return min(MAX_COST_MICRO, (2 * exact + 1_000_000) // 2_000_000)

    def worst(self, input_tokens: int, output_tokens: int) -> int:
        """Return micro-units that so many tokens cost at most; device time is not known yet."""
        plain, cached, output, reasoning, request, _ = self.rates
        exact = input_tokens * max(plain, cached) + output_tokens * max(output, reasoning) + request
        return (2 * exact + 1_000_000) // 2_000_000


class KeyState(NamedTuple):
    principal: Principal
    expires_us: int | None
    revoked_us: int | None
    is_active: bool  # its organization, project and user are


class Subjects(NamedTuple):
    """What applies to one key and model."""

    limits: tuple[Limit, ...]
    budgets: tuple[Budget, ...]


class Rules:
    """One state of what is in force."""

    def __init__(
        self,
        version: int | None,
        keys: dict[str, Any],
        limits: dict[tuple[str, str], list[Limit]],
        budgets: dict[tuple[str, str], list[Budget]],
        units: dict[str, tuple[str, str]],
        prices: list[Price],
    ) -> None:
        self.version = version
        self.units = units  # of every budget there ever was: (unit, currency)
        self._keys = keys
        self._limits = limits
        self._budgets = budgets
        self._prices = prices
        self.chips = tuple(sorted({price.chip for price in prices} - {ANY}))  # that have prices
        self.has_currencies = len({price.currency for price in prices}) > 1
        ends = (price.valid_to_us for price in prices)
        self._bounds = sorted(
            {price.valid_from_us for price in prices} | {end for end in ends if end is not None}
        )
        self._states: dict[str, KeyState] = {}
        self._subjects: dict[tuple[str | None, ...], Subjects] = {}
        self._tariffs: dict[tuple[str, str, str, int, bool], Tariff] = {}

    def key(self, digest: str) -> KeyState | None:
        """Return what is known of the key with this digest."""
        state = self._states.get(digest)
        if state is None and digest in self._keys:
            state = self._states[digest] = _key_state(self._keys[digest])
        return state

    def subjects(self, usage: OpenUsage) -> Subjects:
        """Return limits and budgets of the key, its user, project and organization."""
        who = usage.principal
        memo = (who.key_id, who.user_id, who.project_id, who.org_id, usage.model)
        found = self._subjects.get(memo)
        if found is None:
            if len(self._subjects) >= _MAX_MEMO:
                self._subjects.clear()
            found = self._subjects[memo] = self._find(who, usage.model)
        return found

    def _find(self, who: Principal, model: str) -> Subjects:
        places = (
            ("org", who.org_id), ("project", who.project_id), ("user", who.user_id),
            ("key", who.key_id),
        )  # fmt: skip
        named = [(kind, name) for kind, name in places if name is not None]
        limits = [
            limit for place in named for limit in self._limits.get(place, ())
            if limit.model in ("", model)
        ]  # fmt: skip
        budgets = [budget for place in named for budget in self._budgets.get(place, ())]
        return Subjects(tuple(limits), tuple(budgets))

    def tariff(
        self, model: str, chip: str, at_us: int, base: str = "", *, is_one_currency: bool = False
    ) -> Tariff:
        """Return the prices that held at a time; without any, everything is free.

        `base` is the model whose prices count where `model` has none. `is_one_currency`: only
        prices in the currency of the first kind that has one.

        Raises: ConfigError when they are in several currencies.
        """
        memo = (model, chip, base, bisect.bisect_right(self._bounds, at_us), is_one_currency)
        found = self._tariffs.get(memo)
        if found is None:
            if len(self._tariffs) >= _MAX_MEMO:
                self._tariffs.clear()
            applied = choose_all(self._prices, model, chip, at_us, base=base)
            if is_one_currency:
                first = next((one.currency for one in applied.values()), "")
                applied = {kind: one for kind, one in applied.items() if one.currency == first}
            found = self._tariffs[memo] = _tariff(applied)
        return found


def _tariff(applied: dict[Any, Applied]) -> Tariff:
    rates = tuple(applied[kind].micro_per_million if kind in applied else 0 for kind in KINDS)
    return Tariff(rates, currency_of(applied), encode_applied(applied))


def _key_state(row: Any) -> KeyState:
    models = None if row.models is None else frozenset(json.loads(row.models))
    principal = Principal(
        key_id=row.id, org_id=row.org_id, project_id=row.project_id, user_id=row.user_id,
        scopes=frozenset(json.loads(row.scopes)), models=models, weight=row.weight,
        priority=row.priority,
    )  # fmt: skip
    return KeyState(principal, row.expires_us, row.revoked_us, bool(row.is_active))


def read_version(connection: Connection) -> int | None:
    return connection.execute(select(schema.rules.c.version)).scalar()


def load(connection: Connection) -> Rules:
    """Read everything that is in force, in one transaction of the caller."""
    version = read_version(connection)
    table, every = schema.rate_limits, schema.budgets
    limits: dict[tuple[str, str], list[Limit]] = defaultdict(list)
    for row in connection.execute(select(table).where(table.c.is_active).order_by(table.c.id)):
        place = (row.subject_kind, row.subject_id)
        limits[place].append(
            Limit(row.id, " ".join(place), row.model, row.kind, row.per_minute)
        )  # fmt: skip
    budgets: dict[tuple[str, str], list[Budget]] = defaultdict(list)
    units: dict[str, tuple[str, str]] = {}
    for row in connection.execute(select(every).order_by(every.c.id)):
        units[row.id] = (row.unit, row.currency)
        if row.is_active:
            place = (row.subject_kind, row.subject_id)
            made = Budget(
                row.id, " ".join(place), row.unit, row.currency, row.period, row.limit_amount
            )
            budgets[place].append(made)
    keys = {row.digest: row for row in connection.execute(_keys_query())}
    return Rules(version, keys, limits, budgets, units, load_prices(connection))


def _keys_query() -> Any:
    keys, projects = schema.api_keys, schema.projects
    orgs, users = schema.organizations, schema.users
    is_active = (
        projects.c.is_active & orgs.c.is_active & (keys.c.user_id.is_(None) | users.c.is_active)
    )
    return (
        select(
            keys.c.digest, keys.c.id, keys.c.project_id, keys.c.user_id, keys.c.scopes,
            keys.c.models, keys.c.expires_us, keys.c.revoked_us, projects.c.org_id,
            projects.c.weight, projects.c.priority, is_active.label("is_active"),
        )
        .select_from(keys)
        .join(projects, projects.c.id == keys.c.project_id)
        .join(orgs, orgs.c.id == projects.c.org_id)
        .outerjoin(users, users.c.id == keys.c.user_id)
    )  # fmt: skip


class RulesCache:
    """The newest `Rules` that are known, and since when. `refresh` may run in any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._rules: Rules | None = None
        self.checked_s = float("-inf")  # on `time.monotonic`, when they were last seen to hold

    @property
    def rules(self) -> Rules:
        if self._rules is None:
            raise ConfigError("the ledger has not been started")
        return self._rules

    def refresh(self, *, newer_than_s: float = float("inf")) -> None:
        """See whether anything changed, and read it. Blocking.

        Does nothing if it was done after `newer_than_s`. Raises: SQLAlchemyError.
        """
        with self._lock:
            if self.checked_s > newer_than_s:
                return
            began_s = time.monotonic()
            with self._database.read() as connection:
                known = self._rules
                version = read_version(connection)
                if known is None or version is None or version != known.version:
                    self._rules = load(connection)
            self.checked_s = began_s
