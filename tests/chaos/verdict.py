"""Judges streams that lost their replica: against undisturbed ones, the ledger, and what is left.

Knows streams and the tables of the ledger, not how replicas are hit.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from chaos.judge import wait_for_rest
from chaos.streams import Question, Stream
from mxn.ledger import schema
from mxn.ledger.balance import check
from mxn.ledger.database import Database

GOAL = 0.99  # of the streams that lost their replica end, and end as they would have
_REST_S = 20.0
_SHOWN = 10


@dataclass(slots=True, kw_only=True)
class Report:
    """`lost` counts streams whose replica was hit while they ran, or that had to move."""

    plan: Any
    calm_unequal: int  # of the undisturbed answers, alone and beside others
    lost: int = 0
    finished: int = 0
    identical: int = 0
    moved: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    by_replicas: Counter[int] = field(default_factory=Counter)  # how many made one answer
    spared: int = 0
    spared_bad: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    different: list[Stream] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        share = self.identical / self.lost if self.lost else 0.0
        return share >= GOAL and not self.problems and not self.spared_bad

    def count(
        self, streams: Sequence[Stream], moves: Mapping[str, int], calm: Mapping[Question, Stream]
    ) -> None:
        """Sort streams by what happened to them."""
        for stream in streams:
            num_replicas = moves.get(stream.usage_id, 0)
            is_same = is_equal(stream, calm[stream.question])
            if not stream.problem and not is_same:
                self.different.append(stream)
            if stream.problem:
                self.problems.append(f"{stream.usage_id or 'a stream'}: {stream.problem}")
            # One that never began tells nothing of its replica: it counts as lost.
            if stream.hit or num_replicas > 1 or stream.problem:
                self.lost += 1
                self.moved += num_replicas > 1
                self.finished += not stream.problem
                self.identical += not stream.problem and is_same
                self.by_kind[stream.hit or "moved before it said anything"] += 1
                self.by_replicas[num_replicas] += 1
            else:
                self.spared += 1
                self.spared_bad += not is_same

    def as_dict(self) -> dict[str, Any]:
        names = [name for name in self.__dataclass_fields__ if name != "different"]
        found = {name: getattr(self, name) for name in names}
        found["problems"] = self.problems[:_SHOWN]
        found["seconds"] = round(self.seconds, 1)
        found["share_finished"] = round(self.finished / self.lost, 5) if self.lost else None
        found["share_identical"] = round(self.identical / self.lost, 5) if self.lost else None
        return found


def is_equal(stream: Stream, calm: Stream) -> bool:
    """Whether nothing that a client sees differs."""
    names = ("text", "input_tokens", "output_tokens", "finish_reason")
    return all(getattr(stream, name) == getattr(calm, name) for name in names)


def moves_of(database: Database, streams: Sequence[Stream]) -> dict[str, int]:
    """Return how many replicas took part in each stream, by the id of its row."""
    wait_for_rest(database)
    wanted = {stream.usage_id for stream in streams}
    with database.read() as connection:
        rows = list(connection.execute(schema.usage.select()))
    return {row.id: row.num_replicas for row in rows if row.id in wanted}


def ledger_problems(database: Database, streams: Sequence[Stream]) -> list[str]:
    """Return what the books and the clients do not agree on."""
    problems = list(check(database))
    with database.read() as connection:
        rows = {row.id: row for row in connection.execute(schema.usage.select())}
    for stream in streams:
        row = rows.get(stream.usage_id)
        if stream.problem or row is None:
            if not stream.problem:
                problems.append(f"{stream.usage_id} has no row")
            continue
        told = (stream.input_tokens, stream.output_tokens, "complete")
        held = (row.input_tokens, row.output_tokens, row.reason)
        if told != held:
            problems.append(f"{stream.usage_id}: the client was told {told}, the row says {held}")
    return problems


async def left_behind(http: httpx.AsyncClient, loads: Sequence[tuple[str, str]]) -> list[str]:
    """Return what servers still run or hold, some time after everything ended."""
    until_s = time.monotonic() + _REST_S
    while True:
        problems = []
        for url, key in loads:
            headers = {"authorization": f"Bearer {key}"}
            answer = await http.get(f"{url}/load", headers=headers)
            models = answer.json().get("models", {})
            if answer.status_code != 200 or not all(models.values()):
                problems.append(f"{url}/load: {answer.text}")
            for item in filter(None, models.values()):
                if item["running"] or item["waiting"] or item["kv_pages_used"]:
                    problems.append(f"{url} still holds {item}")
        if not problems or time.monotonic() > until_s:
            return problems
        await asyncio.sleep(0.5)
