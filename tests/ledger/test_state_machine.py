"""Any order of opening, settling, crashing and sweeping, by several gateways on one file."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from mxn.errors import QuotaError
from mxn.ledger.balance import check
from mxn.ledger.compose import decode_reserved
from mxn.ledger.database import Database
from mxn.ledger.keeper import Watch
from mxn.ledger.sql_ledger import SqlLedger
from mxn.ledger.types import Ticket
from support.ledgers import complete, count_rows, make_tenant, period_of, row_of, try_open

LIMIT = 300
NUM_GATEWAYS = 3


@dataclass(eq=False)
class Held:
    """A ticket in the model. `owner` is the gateway that opened it."""

    ticket: Ticket
    owner: SqlLedger
    amount: int


class Machine(RuleBasedStateMachine):
    """The model: who holds how much, and what was spent. Gateways do nothing on their own."""

    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="mxn-ledger-"))
        shutil.copy(self.template, self.folder / "ledger.db")
        self.loop = asyncio.new_event_loop()
        self.database = Database(f"sqlite:///{self.folder / 'ledger.db'}")
        self.tenant = make_tenant(self.database)
        self.budget = self.tenant.budget(LIMIT)
        self.gateways = [self.start() for _ in range(NUM_GATEWAYS)]
        self.crashed: list[SqlLedger] = []
        self.open: dict[Held, None] = {}
        self.spent = self.num_settled = 0

    def start(self) -> SqlLedger:
        ledger = SqlLedger(self.database, mode="inline")
        ledger.keeper._jobs.clear()
        ledger.keeper._watch = Watch(lost_after_s=0)
        self.loop.run_until_complete(ledger.start())
        return ledger

    @property
    def reserved(self) -> int:
        return sum(held.amount for held in self.open)

    tickets = Bundle("tickets")

    @rule(target=tickets, number=st.integers(0, NUM_GATEWAYS - 1), tokens=st.integers(0, 120))
    def open_one(self, number, tokens):
        return self.open_all([(number, tokens)])

    @rule(
        target=tickets,
        wanted=st.lists(
            st.tuples(st.integers(0, NUM_GATEWAYS - 1), st.integers(0, 120)), min_size=2, max_size=8
        ),
    )
    def open_together(self, wanted):
        return self.open_all(wanted)

    def open_all(self, wanted):
        async def ask():
            usages = [self.tenant.usage(0, tokens) for _, tokens in wanted]
            return await asyncio.gather(
                *(
                    try_open(self.gateways[number], usage)
                    for (number, _), usage in zip(wanted, usages, strict=True)
                )
            )

        found, left = self.loop.run_until_complete(ask()), LIMIT - self.spent - self.reserved
        made = []
        for (number, tokens), ticket in zip(wanted, found, strict=True):
            if isinstance(ticket, Ticket):
                made.append(Held(ticket, self.gateways[number], tokens))
            else:
                assert isinstance(ticket, QuotaError)
        self.open |= dict.fromkeys(made)
        left -= sum(held.amount for held in made)
        assert left >= 0
        refused = [
            tokens for (_, tokens), one in zip(wanted, found, strict=True)
            if not isinstance(one, Ticket)
        ]  # fmt: skip
        assert all(tokens > left for tokens in refused), "one that fits was refused"
        return multiple(*made)

    @rule(held=tickets, share=st.floats(0, 1), number=st.integers(0, NUM_GATEWAYS - 1))
    def settle(self, held, share, number):
        """Also again, after a sweep, and by a gateway that did not open it."""
        owner = self.gateways[number] if held.owner in self.crashed else held.owner
        tokens = int(held.amount * share)
        used = complete(0, tokens)
        receipt = self.loop.run_until_complete(owner.settle(held.ticket, used))
        assert receipt.is_new == (held in self.open)
        if receipt.is_new:
            self.close_held(held, tokens)

    @rule(held=consumes(tickets))
    def forget(self, held):
        """A client that never comes back; only a crash of the gateway closes its row."""

    def close_held(self, held, tokens):
        del self.open[held]
        self.spent += tokens
        self.num_settled += 1

    @rule(number=st.integers(0, NUM_GATEWAYS - 1), tokens=st.integers(0, 120))
    def crash(self, number, tokens):
        """A gateway dies while a request is on its way to the database."""
        ledger, usage = self.gateways[number], self.tenant.usage(0, tokens)
        task = self.loop.create_task(try_open(ledger, usage))
        self.loop.run_until_complete(asyncio.sleep(0))
        kill(ledger)
        task.cancel()
        self.loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        row = row_of(self.database, usage.usage_id)
        if row is not None:
            reserved = tuple(decode_reserved(row.reserved))
            ticket = Ticket(usage=usage, opened_us=row.opened_us, reserved=reserved)
            self.open[Held(ticket, ledger, tokens)] = None
        self.crashed.append(ledger)
        self.gateways[number] = self.start()

    @rule(
        number=st.integers(0, NUM_GATEWAYS - 1),
        paused=st.sets(st.integers(0, NUM_GATEWAYS - 1), max_size=2),
    )
    def sweep(self, number, paused):
        """Hearts of living gateways beat between the looks, those of paused ones do not."""
        sweeper = self.gateways[number]
        lost = [*self.crashed, *(self.gateways[one] for one in paused - {number})]

        def look():
            for _ in range(3):
                sweeper.keeper.sweep()
                for gateway in self.gateways:
                    if gateway not in lost:
                        gateway.keeper._beat()
            sweeper.keeper.sweep()
            sweeper.keeper._watch.forget()

        look()
        while sweeper._settling or not self.is_idle():
            self.loop.run_until_complete(asyncio.sleep(0))
        for held in [one for one in self.open if one.owner in lost]:
            self.close_held(held, 0)

    def is_idle(self) -> bool:
        """Let what the sweep asked for from another thread reach the loop."""
        self.loop.run_until_complete(asyncio.sleep(0))
        return not any(gateway._settling for gateway in self.gateways)

    @invariant()
    def books_balance(self):
        assert check(self.database) == []
        assert period_of(self.database, self.budget) == (self.reserved, self.spent)
        assert self.reserved + self.spent <= LIMIT
        assert count_rows(self.database, state="open") == len(self.open)
        assert count_rows(self.database, state="settled") == self.num_settled

    def teardown(self):
        for gateway in self.gateways:
            self.loop.run_until_complete(gateway.close())
        self.loop.close()
        self.database.close()
        shutil.rmtree(self.folder)


def kill(ledger: SqlLedger) -> None:
    """End a ledger as SIGKILL would: nothing more is written, nobody says goodbye."""
    ledger.keeper._stopped.set()
    ledger.keeper._thread.join()
    ledger._ticker.cancel()
    ledger._writer.stop()


@pytest.fixture(scope="module", autouse=True)
def _template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "ledger.db"
    Database.open(f"sqlite:///{path}").close()
    Machine.template = path


TestLedger = Machine.TestCase
TestLedger.settings = settings(
    max_examples=12, stateful_step_count=20, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
