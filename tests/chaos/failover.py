"""Streams lose their replica at a random token and must end as if nothing had been.

First every question is answered undisturbed. Then the same questions are asked in rounds, many at
once, while replicas that serve them are killed or stopped; the answers, the ledger and what the
servers hold afterwards are compared. Start at `run_failover`.

python -m chaos.failover --streams 300 --replicas 3 --seed 1      (in tests/)
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec

from chaos.pools import Local, Pool, Remote
from chaos.streams import Asker, Question, Stream, first_difference, questions
from chaos.verdict import Report, ledger_problems, left_behind, moves_of
from mxn.ledger import keys, tenants
from mxn.ledger.database import Database

_KINDS = {"kill": 6, "pause": 3, "pause, then kill": 2}
_MOST_ROUNDS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`streams`: rounds go on until so many have lost their replica."""

    streams: int
    replicas: int = 3
    seed: int = 0
    is_local: bool = False
    num_questions: int = 48
    at_once: int = 24
    stall_limit_s: float = 1.0
    pause_s: float = 3.0  # a replica that was stopped goes on after this
    num_alone: int = 24  # questions that are asked one after another too, before anything is hit


@dataclass(slots=True, eq=False)
class Hit:
    """What happens when one stream, the `target`, has got `at_piece` pieces of text."""

    pool: Pool
    asker: Asker
    kind: str
    target: int
    at_piece: int
    pause_s: float
    victim: str = ""
    is_done: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def watch(self, stream: Stream, others: Sequence[Hit]) -> None:
        if self.is_done or stream.num_pieces < self.at_piece:
            return
        self.is_done = True
        victim = stream.replica
        if any(item.is_done and item.victim == victim for item in others if item is not self):
            return  # it is down already, and this stream is on its second replica
        self.victim = victim
        if self.kind == "kill":
            self.pool.kill(victim)
        else:
            self.pool.pause(victim)
            self.tasks.append(asyncio.create_task(self._go_on()))
        for live in self.asker.live:
            if live.is_live and live.replica == victim:
                live.hit = live.hit or self.kind

    async def _go_on(self) -> None:
        await asyncio.sleep(self.pause_s)
        if self.kind == "pause":
            self.pool.resume(self.victim)
        else:
            self.pool.kill(self.victim)


@dataclass(slots=True)
class Experiment:
    plan: Plan
    pool: Pool
    asker: Asker
    rng: random.Random
    hits: Counter[str] = field(default_factory=Counter)
    streams: list[Stream] = field(default_factory=list)

    async def calm(self, asked: Sequence[Question], at_once: int) -> dict[Question, Stream]:
        """Return undisturbed answers."""
        limit = asyncio.Semaphore(at_once)

        async def one(question: Question) -> Stream:
            async with limit:
                return await self.asker.ask(question)

        answers = await asyncio.gather(*(one(question) for question in asked))
        broken = [item.problem for item in answers if item.problem]
        assert not broken, broken
        return dict(zip(asked, answers, strict=True))

    async def disturbed(self, asked: Sequence[Question]) -> None:
        """Run rounds until enough streams have lost their replica."""
        for _ in range(_MOST_ROUNDS):
            if sum(bool(stream.hit) for stream in self.streams) >= self.plan.streams:
                return
            await self._round(asked)

    async def _round(self, asked: Sequence[Question]) -> None:
        plan, rng = self.plan, self.rng
        chosen = [rng.choice(asked) for _ in range(plan.at_once)]
        hits = self._hits(chosen)

        async def one(number: int) -> Stream:
            await asyncio.sleep(rng.uniform(0, 0.15))
            own = next((hit for hit in hits if hit.target == number), None)
            watch = None if own is None else (lambda stream: own.watch(stream, hits))
            return await self.asker.ask(chosen[number], watch)

        self.streams += await asyncio.gather(*(one(number) for number in range(plan.at_once)))
        for hit in hits:
            if hit.tasks:
                await asyncio.wait(hit.tasks)
            if hit.victim:
                self.hits[hit.kind] += 1
        await asyncio.to_thread(self.pool.make_whole)

    def _hits(self, chosen: Sequence[Question]) -> list[Hit]:
        """Return one hit, or as many as the pool stands, on different streams."""
        rng = self.rng
        count = rng.randint(1, self.plan.replicas - 1) if rng.random() < 0.4 else 1
        targets = rng.sample(range(len(chosen)), count)
        hits = []
        for target in targets:
            is_full = len(hits) >= self.pool.most_kills
            kind = "pause" if is_full else rng.choices(list(_KINDS), list(_KINDS.values()))[0]
            # Well before the end even where the answer ends by itself.
            at_piece = rng.randint(1, chosen[target].max_tokens // 3)
            hit = Hit(self.pool, self.asker, kind, target, at_piece, self.plan.pause_s)
            hits.append(hit)
        return hits


async def _run(plan: Plan, pool: Pool, key: str, database: Database) -> Report:
    rng = random.Random(plan.seed)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, limits=limits) as http:
        asker = Asker(pool.url, key, http)
        experiment = Experiment(plan, pool, asker, rng)
        asked = questions(plan.num_questions, rng)
        expected = await experiment.calm(asked, plan.at_once)
        alone = await experiment.calm(asked[: plan.num_alone], 1)
        unequal = [q for q, stream in alone.items() if stream.text != expected[q].text]
        report = Report(plan=plan, calm_unequal=len(unequal))
        await experiment.disturbed(asked)
        report.hits = experiment.hits
        moves = moves_of(database, experiment.streams)
        report.count(experiment.streams, moves, expected)
        for stream in report.different[:8]:
            report.problems.append(await _explained(asker, stream, expected[stream.question]))
        report.problems += await left_behind(http, pool.loads)
        report.problems += ledger_problems(database, experiment.streams)
    return report


async def _explained(asker: Asker, stream: Stream, calm: Stream) -> str:
    """Say where an answer leaves the undisturbed one, and how sure the model was there."""
    at = first_difference(stream.text, calm.text)
    length, lead = 0, float("nan")
    for text, margin in await asker.margins(stream.question):
        length, lead = length + len(text), margin
        if length > at:
            break
    return (
        f"{stream.usage_id}: {stream.text[at - 10 : at + 20]!r} instead of "
        f"{calm.text[at - 10 : at + 20]!r} at character {at} ({stream.hit or 'not hit'}; "
        f"{stream.output_tokens} tokens of {calm.output_tokens}; the best leads by {lead:.2g})"
    )


def run_failover(home: Path, plan: Plan) -> Report:
    """Start everything, run it, stop everything."""
    url = f"sqlite:///{home}/ledger.db"
    database = Database.open(url)
    with database.begin() as connection:
        now = time.time_ns() // 1000
        project = tenants.ensure_default(connection, now_us=now)
        _, key = keys.create_key(connection, project, name="failover", now_us=now)
    kind = Local if plan.is_local else Remote
    pool = kind(home, url, key, plan.replicas, plan.stall_limit_s)
    began_s = time.monotonic()
    try:
        pool.start()
        report = asyncio.run(_run(plan, pool, key, database))
    finally:
        pool.stop()
        database.close()
    report.seconds = time.monotonic() - began_s
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=300, help="that lose their replica")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=24)
    parser.add_argument("--stall-limit", type=float, default=1.0)
    parser.add_argument("--local", action="store_true", help="engine processes in one server")
    parser.add_argument("--json", type=Path, help="where the report is written, too")
    options = parser.parse_args(arguments)
    plan = Plan(
        streams=options.streams, replicas=options.replicas, seed=options.seed,
        is_local=options.local, at_once=options.at_once, stall_limit_s=options.stall_limit,
        pause_s=3 * options.stall_limit,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        report = run_failover(Path(folder), plan)
    shown = msgspec.json.format(msgspec.json.encode(report.as_dict())).decode()
    print(shown)
    if options.json:
        options.json.write_text(shown + "\n")
    raise SystemExit(0 if report.is_good else 1)


if __name__ == "__main__":
    main()
