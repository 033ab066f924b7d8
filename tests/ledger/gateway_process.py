"""A gateway in a process of its own, for tests that kill it: opens requests, and says so.

    python gateway_process.py URL PRINCIPAL-JSON NUM MODE

MODE `finish` settles each request that got in and prints how many; `hang` opens them, notes
progress, prints their ids and waits to be killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

import msgspec

from mxn.errors import QuotaError
from mxn.ledger.database import Database
from mxn.ledger.sql_ledger import SqlLedger
from mxn.ledger.types import OpenUsage, Principal, Settlement, Ticket


async def one(ledger: SqlLedger, usage: OpenUsage, is_hanging: bool) -> Ticket | None:
    try:
        ticket = await ledger.open(usage)
    except QuotaError:
        return None
    if is_hanging:
        ledger.progress(ticket, 10, 3, chip="cpu")
    else:
        used = Settlement(reason="complete", chip="cpu", input_tokens=10, output_tokens=20)
        await ledger.settle(ticket, used)
    return ticket


async def main(url: str, principal: Principal, num: int, mode: str) -> None:
    ledger = SqlLedger(Database(url), progress_s=0.05, lost_after_s=60)
    usages = [
        OpenUsage(
            usage_id=f"u-{os.getpid()}-{index}", request_id="r", principal=principal,
            endpoint="chat", model="m", chips=("cpu",), input_tokens=10, max_output_tokens=20,
        )
        for index in range(num)
    ]  # fmt: skip
    await ledger.start()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    tickets: list[Ticket] = []

    async def client(mine: list[OpenUsage]) -> None:  # one after the other: many transactions
        for usage in mine:
            ticket = await one(ledger, usage, mode == "hang")
            if ticket is not None:
                tickets.append(ticket)

    await asyncio.gather(*(client(usages[start::4]) for start in range(4)))
    if mode == "hang":
        await asyncio.sleep(0.4)  # progress is written meanwhile
        print(json.dumps([ticket.usage.usage_id for ticket in tickets]), flush=True)
        await asyncio.Event().wait()
    await ledger.close()
    print(json.dumps(len(tickets)), flush=True)


if __name__ == "__main__":
    who = msgspec.json.decode(sys.argv[2], type=Principal)
    asyncio.run(main(sys.argv[1], who, int(sys.argv[3]), sys.argv[4]))
