"""The statements of the hot path, on the driver's own connection. Decides nothing.

A `Store` runs one transaction in two steps: `begin` locks and reads what decisions need and closes
rows; `commit` writes what was decided. Locks are taken in the order of their keys, so that gateways
do not wait for each other in a circle. Both stores are driven from one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mxn.ledger import schema
from mxn.ledger.operations import PeriodKey, Settling

OPEN_COLUMNS = (
    "id", "request_id", "gateway_id", "org_id", "project_id", "user_id", "key_id", "endpoint",
    "model", "chip", "opened_us", "reserved", "batch_id", "is_stream", "state",
    "base",
)  # fmt: skip
# The last one says which row.
SETTLE_COLUMNS = (
    "settled_us", "reason", "status", "chip", "replica", "input_tokens", "cached_tokens",
    "output_tokens", "reasoning_tokens", "num_replicas", "basis", "device_us", "cost_micro",
    "currency", "prices", "id",
)  # fmt: skip
PROGRESS_COLUMNS = ("input_tokens", "output_tokens", "chip", "replica", "id")
CLOSED_COLUMNS = ("id", "state", "settled_us", "reason", "cost_micro", "currency")


@dataclass(slots=True)
class View:
    """What `begin` found: amounts under lock, rows it closed, and ids that are taken."""

    periods: dict[PeriodKey, tuple[int, int]] = field(default_factory=dict)  # reserved, spent
    windows: dict[PeriodKey, int] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)
    existing: dict[str, tuple[str, int]] = field(default_factory=dict)  # gateway, opened_us


class Store(Protocol):
    @staticmethod
    def is_away(error: BaseException) -> bool:
        """Say whether the same batch is tried again on a new connection after this error; any
        other is the batch's own fault, and would come back for ever."""
        ...

    def begin(
        self,
        periods: Sequence[PeriodKey],
        windows: Sequence[PeriodKey],
        settlings: Sequence[Settling],
        progress: Sequence[tuple[Any, ...]],
        ids: Sequence[str],
        *,
        decides: bool = True,
    ) -> View:
        """Without `decides` nobody asks for the amounts of periods and windows; a store under whose
        lock nothing else is written need not read them."""
        ...

    def closed(self, ids: Iterable[str]) -> dict[str, tuple[Any, ...]]:
        """Return `CLOSED_COLUMNS` of rows, within the transaction."""
        ...

    def commit(
        self,
        rows: Sequence[tuple[Any, ...]],
        moves: Mapping[PeriodKey, Sequence[int]],
        adds: Mapping[PeriodKey, int],
    ) -> None:
        """Insert rows, move (reserved, spent) of periods, add to windows; then commit."""
        ...

    def rollback(self) -> None: ...

    def close(self) -> None: ...


def type_of(column: str) -> str:
    """Return the PostgreSQL type of a column of `usage`."""
    name = str(schema.usage.c[column].type)
    return {"TEXT": "text", "BIGINT": "bigint", "INTEGER": "integer", "BOOLEAN": "boolean"}[name]
