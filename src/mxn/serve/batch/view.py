"""What a client sees of a batch: its row, how far its lines are, and what it has used so far."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import Connection, func, select

from mxn.ledger.schema import usage
from mxn.ledger.tables_batch import batch_lines
from mxn.serve.batch.types import (
    Batch,
    BatchError,
    BatchErrors,
    BatchOutputDetails,
    BatchTokensDetails,
    BatchUsage,
    RequestCounts,
)

_US = 1_000_000
_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


def batch_of(connection: Connection, row: Any) -> Batch:
    """Return what a client sees of a row of `batches`; counts its lines and their tokens."""

    def seconds(name: str) -> int | None:
        value = row[f"{name}_us"]
        return value // _US if value is not None else None

    errors = msgspec.json.decode(row["errors"], type=list[BatchError]) if row["errors"] else None
    return Batch(
        id=row["id"],
        endpoint=row["endpoint"],
        model=row["model"],
        errors=BatchErrors(data=errors) if errors else None,
        input_file_id=row["input_file_id"],
        completion_window=row["completion_window"],
        status=row["status"],
        output_file_id=row["output_file_id"],
        error_file_id=row["error_file_id"],
        created_at=row["created_us"] // _US,
        expires_at=row["expires_us"] // _US,
        **{f"{name}_at": seconds(name) for name in _TIMES},  # type: ignore[arg-type]
        request_counts=_counts(connection, row["id"]),
        usage=_usage(connection, row["id"]),
        metadata=msgspec.json.decode(row["metadata"]) if row["metadata"] else None,
    )


def _counts(connection: Connection, batch_id: str) -> RequestCounts:
    query = (
        select(batch_lines.c.state, func.count())
        .where(batch_lines.c.batch_id == batch_id)
        .group_by(batch_lines.c.state)
    )
    counts: dict[str, int] = {row[0]: row[1] for row in connection.execute(query)}
    return RequestCounts(
        total=sum(counts.values()),
        completed=counts.get("completed", 0),
        failed=counts.get("failed", 0),
    )


def _usage(connection: Connection, batch_id: str) -> BatchUsage | None:
    columns = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
    sums = [func.coalesce(func.sum(usage.c[name]), 0) for name in columns]
    query = select(func.count(), *sums).where(
        usage.c.batch_id == batch_id,
        usage.c.state == "settled",
        (usage.c.reason == "complete") | (usage.c.output_tokens > 0),  # what is paid for
    )
    row: Any = connection.execute(query).one()
    count, given, cached, made, reasoning = row
    if not count:
        return None
    return BatchUsage(
        input_tokens=int(given),
        input_tokens_details=BatchTokensDetails(cached_tokens=int(cached)),
        output_tokens=int(made),
        output_tokens_details=BatchOutputDetails(reasoning_tokens=int(reasoning)),
        total_tokens=int(given) + int(made),
    )
