"""The adapters of a pool: what every replica should have, and how one that lacks some gets them.

A replica that joins, restarts or was away is given what the pool keeps, beside the traffic or just
before a request that needs it. Knows seats and messages; knows no streams. Start at
`PoolAdapters.load`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

from mxn.engine.adapters import NOT_FOUND_CODE
from mxn.engine.protocol import AdapterLoaded, Delta, Generate, LoadAdapter, UnloadAdapter
from mxn.errors import EngineDiedError, MxnError, NotFoundError, UnsupportedError, UserError
from mxn.serve.fleet import Fleet, Seat

log = logging.getLogger("mxn.serve")

_UNLOAD_S = 5.0
_RETRY_S = 30.0  # after a replica could not load an adapter, such as for a missing folder
CHANGING = -1  # the version of an adapter that is being replaced: equal to none


class AdapterAway(EngineDiedError):
    """A replica is well and lacks an adapter for now: another one may have it."""


@dataclass(slots=True, eq=False)
class _State:
    """What is under way at one seat."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one change at a time
    task: asyncio.Task[None] | None = None
    num_losses: int = 0  # of what it had, such as by a restart
    retry_at_s: float = float("-inf")
    failure: str = ""


class PoolAdapters:
    """`Fleet.adapters` says what is wanted, `Seat.adapters` what is there, both by version."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._paths: dict[str, str] = {}
        self._changing: set[str] = set()
        self._num_loads = 0
        self._states: WeakKeyDictionary[Seat, _State] = WeakKeyDictionary()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._paths)

    def version(self, name: str | None) -> int | None:
        """Return a number that changes with the weights of a name; None: the pool has none.

        `CHANGING` while replicas may differ: two of these are not the same weights.
        """
        if name is None:
            return None
        return CHANGING if name in self._changing else self._fleet.adapters.get(name)

    async def load(self, request: LoadAdapter) -> AdapterLoaded:
        """Load an adapter on all replicas, or on none; one that is down gets it when it is back.

        Raises: UnsupportedError when one takes no adapters; what a replica raised; EngineDiedError
        when none is there.
        """
        name, seats = request.name, list(self._fleet)
        if not all(hasattr(seat.replica.client, "load_adapter") for seat in seats):
            raise UnsupportedError("not every replica of this model takes adapters")
        self._changing.add(name)
        try:
            results = await asyncio.gather(
                *(self._load_on(seat, request) for seat in seats), return_exceptions=True
            )
            errors = [item for item in results if isinstance(item, BaseException)]
            done = [item for item in results if not isinstance(item, BaseException)]
            wrong = [error for error in errors if not isinstance(error, EngineDiedError)]
            if wrong or not done:
                await asyncio.gather(*(self._take_back(seat, name) for seat, *_ in done))
                raise _first(wrong or errors, self._fleet)
            self._num_loads += 1
            self._paths[name] = request.path
            self._fleet.adapters[name] = self._num_loads
            for seat, num_losses, _ in done:
                if self._state(seat).num_losses == num_losses:
                    seat.adapters[name] = self._num_loads
            return done[0][2]
        finally:
            self._changing.discard(name)

    async def unload(self, request: UnloadAdapter) -> AdapterLoaded:
        """Forget an adapter everywhere; a replica that is down forgets it when it is back.

        Raises: NotFoundError when neither the pool nor a replica has it; EngineDiedError.
        """
        is_kept = self._paths.pop(request.name, None) is not None
        self._fleet.adapters.pop(request.name, None)
        seats = list(self._fleet)
        results = await asyncio.gather(
            *(self._unload_on(seat, request) for seat in seats), return_exceptions=True
        )
        errors = [item for item in results if isinstance(item, BaseException)]
        for item in results:
            if not isinstance(item, BaseException):
                return item
        if not is_kept or any(not isinstance(error, _MAY_BE_GONE) for error in errors):
            raise _first(errors, self._fleet)
        return AdapterLoaded(request_id=request.request_id, adapters=self.names)

    def lost(self, seat: Seat, name: str | None = None) -> None:
        """A replica was away, or says that it lacks an adapter: what it has is not known now.

        One that keeps its adapters itself over a restart says so by the attribute `adapters`.
        """
        own = getattr(seat.replica.client, "adapters", ()) if name is None else ()
        gone = [each for each in seat.adapters if each not in own and name in (None, each)]
        for each in gone:
            seat.adapters[each] = 0
        self._state(seat).num_losses += bool(gone)

    def joined(self, seat: Seat) -> None:
        """A replica is new in the pool; without a running loop it waits for its first request."""
        with suppress(RuntimeError):
            asyncio.get_running_loop()
            self.wake(seat)

    async def close(self) -> None:
        """End what is under way beside the traffic."""
        tasks = [state.task for state in self._states.values() if state.task is not None]
        mine = [task for task in tasks if task.get_loop() is asyncio.get_running_loop()]
        for task in mine:
            task.cancel()
        if mine:
            await asyncio.wait(mine)

    def wake(self, seat: Seat) -> None:
        """Begin to give a replica what it lacks, if anything, beside the traffic."""
        if not seat.replica.client.is_healthy or self._next(seat) is None:
            return
        state = self._state(seat)
        if self._fleet.clock() >= state.retry_at_s:
            self._start(seat, state)

    def stream(self, seat: Seat, request: Generate) -> AsyncIterator[Delta]:
        """Return the deltas of a request, which wait until the replica has its adapter.

        Raises, from the iterator: AdapterAway when it cannot be had, and what `generate` raises.
        """
        if request.adapter is None:
            return seat.replica.client.generate(request)
        return self._stream(seat, request, request.adapter)

    async def _stream(self, seat: Seat, request: Generate, name: str) -> AsyncIterator[Delta]:
        if not self._is_there(seat, name):
            await self._bring(seat, name)
        try:
            async with aclosing(cast(Any, seat.replica.client.generate(request))) as deltas:
                async for delta in deltas:
                    yield delta
        except NotFoundError as error:
            if error.code != NOT_FOUND_CODE or name not in self._fleet.adapters:
                raise
            self.lost(seat, name)
            self.wake(seat)
            raise _away(seat, error.message) from error

    async def _bring(self, seat: Seat, name: str) -> None:
        """Wait until a replica has an adapter. Raises: AdapterAway with the reason."""
        state = self._state(seat)
        if self._fleet.clock() >= state.retry_at_s:
            # Shielded: others wait for it too, and a client that hangs up must not undo it.
            await asyncio.shield(self._start(seat, state))
        if not self._is_there(seat, name):
            raise _away(seat, state.failure or f"adapter {name!r} is being replaced")

    def _is_there(self, seat: Seat, name: str) -> bool:
        """Whether a replica has it; of a name that the pool does not keep the replica decides."""
        wanted = self._fleet.adapters.get(name)
        return wanted is None or seat.adapters.get(name) == wanted

    def _start(self, seat: Seat, state: _State) -> asyncio.Task[None]:
        task = state.task
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            task = state.task = asyncio.create_task(self._mend(seat, state))
        return task

    async def _mend(self, seat: Seat, state: _State) -> None:
        """Load what a replica lacks and unload what it should not have."""
        async with state.lock:
            while (name := self._next(seat)) is not None:
                try:
                    await self._mend_one(seat, name)
                except EngineDiedError as error:
                    state.failure = error.message  # the prober sees when it is back
                    return
                except MxnError as error:
                    state.failure = error.message
                    state.retry_at_s = self._fleet.clock() + _RETRY_S
                    log.error("replica %s has no adapter %r: %s", seat.id, name, error)
                    return

    async def _mend_one(self, seat: Seat, name: str) -> None:
        client: Any = seat.replica.client
        version = self._fleet.adapters.get(name)
        num_losses = self._state(seat).num_losses
        if version is None:
            message = UnloadAdapter(request_id=self._id(seat), name=name)
            # UserError: a restart took it along. Too late: it is gone when its last user is.
            with suppress(UserError, TimeoutError):
                async with asyncio.timeout(_UNLOAD_S):
                    await client.unload_adapter(message)
            seat.adapters.pop(name, None)
            return
        if not hasattr(client, "load_adapter"):
            raise UnsupportedError("it takes no adapters")
        path = self._paths[name]
        await client.load_adapter(LoadAdapter(request_id=self._id(seat), name=name, path=path))
        is_same = self._state(seat).num_losses == num_losses
        seat.adapters[name] = version if is_same else 0

    def _next(self, seat: Seat) -> str | None:
        """Return the name of an adapter that a replica lacks or has too much."""
        wanted, there = self._fleet.adapters, seat.adapters
        names = [name for name in wanted if there.get(name) != wanted[name]]
        names += [name for name in there if name not in wanted]
        return next((name for name in names if name not in self._changing), None)

    async def _load_on(self, seat: Seat, request: LoadAdapter) -> tuple[Seat, int, AdapterLoaded]:
        state = self._state(seat)
        async with state.lock:
            num_losses = state.num_losses
            try:
                loaded = await cast(Any, seat.replica.client).load_adapter(request)
            except EngineDiedError:
                seat.adapters[request.name] = 0  # whether it came so far is not known
                raise
            state.retry_at_s = float("-inf")
            return seat, num_losses, loaded

    async def _unload_on(self, seat: Seat, request: UnloadAdapter) -> AdapterLoaded:
        client: Any = seat.replica.client
        if not hasattr(client, "unload_adapter"):
            raise UnsupportedError("not every replica of this model takes adapters")
        # Without the lock, for it lasts until the last stream that uses it has ended; noted before,
        # for a load of the same name may come meanwhile.
        seat.adapters.pop(request.name, None)
        try:
            return await client.unload_adapter(request)
        except UserError:
            raise  # it has no such adapter
        except MxnError:
            seat.adapters.setdefault(request.name, 0)
            raise

    async def _take_back(self, seat: Seat, name: str) -> None:
        """Undo a load that failed elsewhere: back to the earlier one of that name, or to none."""
        async with self._state(seat).lock:
            try:
                await self._mend_one(seat, name)
            except MxnError as error:
                seat.adapters[name] = 0  # the prober tries again
                log.error("replica %s keeps adapter %r for now: %s", seat.id, name, error)

    def _state(self, seat: Seat) -> _State:
        state = self._states.get(seat)
        if state is None:
            state = self._states[seat] = _State()
        return state

    def _id(self, seat: Seat) -> str:
        self._num_loads += 1  # shared with versions: both only have to differ
        return f"adapter-{seat.id}-{self._num_loads}"


_MAY_BE_GONE = (UserError, EngineDiedError)


def _away(seat: Seat, reason: str) -> AdapterAway:
    return AdapterAway(f"replica {seat.id}: {reason}", retry_after_s=1.0)


def _first(errors: list[BaseException], fleet: Fleet) -> BaseException:
    if errors:
        return errors[0]
    return EngineDiedError(f"no replica is up: {fleet.states()}", retry_after_s=1.0)
