"""The adapters of one replica: their names and generations, who uses them, when they may go.

A thread reads an adapter's files, for a disk may be slow; the loop puts it beside the weights
between two steps. An adapter that is unloaded, or loaded again under its name, takes no new
requests and stays until the last one that uses it has ended. Knows names, counts and messages; the
arithmetic is that of `mxn.models.lora`. Start at `Adapters.load`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mxn.engine.protocol import AdapterLoaded, Failed, FromEngine, LoadAdapter, UnloadAdapter
from mxn.errors import CapacityError, MxnError, NotFoundError, UnsupportedError, UserError

if TYPE_CHECKING:
    from mxn.models.lora import AdaptedModel
    from mxn.models.lora_files import AdapterFiles

log = logging.getLogger("mxn.engine")

NOT_FOUND_CODE = "adapter_not_found"

_NAP_S = 0.005  # the longest wait for a file where there is nothing else to do


@dataclass(slots=True, eq=False)
class Adapter:
    """One load of an adapter. A later load of the same name is another one."""

    name: str
    generation: int  # counts loads; the key under which the model knows it
    num_users: int = 0
    is_leaving: bool = False
    waiting: list[UnloadAdapter] = field(default_factory=list)  # answered when it is gone

    @property
    def salt(self) -> bytes:
        """For the prefix cache: keys and values of another adapter, or load, are other ones."""
        return f"{self.generation}/{self.name}".encode()


class Adapters:
    """What the loop knows of adapters. Not thread safe."""

    def __init__(self, model: Any, *, max_adapters: int) -> None:
        self._model = model
        self._max_adapters = max_adapters
        self._adapted: AdaptedModel | None = None  # made at the first load
        self._by_name: dict[str, Adapter] = {}
        self._num_installed = 0  # with those that are leaving
        self._num_loads = 0
        self._answers: list[FromEngine] = []
        # Changes in the order in which they came; the first is a load whose files are being read.
        self._pending: deque[LoadAdapter | UnloadAdapter] = deque()
        self._reading: Future[AdapterFiles] | None = None

    @property
    def is_reading(self) -> bool:
        """Whether an answer comes without a request under way: ask for `answers` again."""
        return self._reading is not None

    @property
    def adapted(self) -> AdaptedModel | None:
        """The model with the adapters beside its weights; None while none is there."""
        return self._adapted if self._num_installed else None

    @property
    def is_applied(self) -> bool:
        """Whether the forward pass under way goes through an adapter."""
        return self._adapted is not None and self._adapted.is_applied

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def load(self, message: LoadAdapter) -> list[FromEngine]:
        """Load an adapter, in place of the one that has its name; `answers` has the answer."""
        self._pending.append(message)
        return self._go_on()

    def unload(self, message: UnloadAdapter) -> list[FromEngine]:
        """Take no new requests for an adapter; the answer may come later, from `answers`."""
        self._pending.append(message)
        return self._go_on()

    def take(self, name: str) -> Adapter:
        """Return the adapter for a new request; pair it with `release`. Raises: NotFoundError."""
        adapter = self._by_name.get(name)
        if adapter is None:
            raise self._unknown(name)
        adapter.num_users += 1
        return adapter

    def release(self, adapter: Adapter | None) -> None:
        """A request has ended. The last one of an adapter that is leaving takes it along."""
        if adapter is None:
            return
        adapter.num_users -= 1
        if adapter.is_leaving and not adapter.num_users:
            self._remove(adapter)

    def answers(self) -> list[FromEngine]:
        """Return the answers to what is done by now, each once; puts in what has been read."""
        if self._reading is not None and self._reading.done():
            return self._finish(self._reading) + self._go_on()
        if not self._answers:
            return []
        answers, self._answers = self._answers, []
        return answers

    def answers_soon(self) -> list[FromEngine]:
        """Return `answers` after a short wait for a file: for a loop without other work."""
        if self._reading is not None:
            wait([self._reading], _NAP_S)
        return self.answers()

    def _go_on(self) -> list[FromEngine]:
        """Work on what is pending until a file has to be read."""
        while self._pending and self._reading is None:
            message = self._pending[0]
            if isinstance(message, LoadAdapter):
                self._begin(message)
            else:
                self._pending.popleft()
                self._unload(message)
        answers, self._answers = self._answers, []
        return answers

    def _unload(self, message: UnloadAdapter) -> None:
        adapter = self._by_name.pop(message.name, None)
        if adapter is None:
            reason = self._unknown(message.name).message
            self._answers.append(_failed(message, reason, True, "NotFoundError"))
            return
        adapter.waiting.append(message)
        self._leave(adapter)

    def _begin(self, message: LoadAdapter) -> None:
        """Begin to read an adapter's files, if there is room for it."""
        from mxn.models.lora import AdaptedModel

        def check() -> None:
            if not message.name:
                raise UnsupportedError("an adapter needs a name")
            if self._adapted is None:
                self._adapted = AdaptedModel(self._model)
            if message.name not in self._by_name and self._num_installed >= self._max_adapters:
                raise CapacityError(
                    f"{self._num_installed} adapters are loaded, which is the limit",
                    hint="unload one, or raise max_adapters",
                )

        refused = _attempt(message, check)
        if refused is not None:
            self._pending.popleft()
            self._answers.append(refused)
            return
        self._reading = _read_aside(message.path)

    def _finish(self, reading: Future[AdapterFiles]) -> list[FromEngine]:
        message = self._pending.popleft()
        assert isinstance(message, LoadAdapter), "an unload needs no file"
        self._reading = None
        refused = _attempt(message, lambda: self._install(message, reading.result()))
        return [refused] if refused is not None else []

    def _install(self, message: LoadAdapter, files: AdapterFiles) -> None:
        assert self._adapted is not None, "made before the files are read"
        before = self._by_name.get(message.name)
        self._num_loads += 1
        self._adapted.install(self._num_loads, files)
        self._num_installed += 1
        self._by_name[message.name] = Adapter(message.name, self._num_loads)
        if before is not None:
            self._leave(before)
        log.info("adapter %r from %s: rank %d", message.name, message.path, files.rank)
        loaded = AdapterLoaded(
            request_id=message.request_id,
            adapters=self.names,
            rank=files.rank,
            num_parameters=files.num_parameters,
        )
        self._answers.append(loaded)

    def _leave(self, adapter: Adapter) -> None:
        adapter.is_leaving = True
        if not adapter.num_users:
            self._remove(adapter)

    def _remove(self, adapter: Adapter) -> None:
        assert self._adapted is not None, "it was loaded"
        self._adapted.remove(adapter.generation)
        self._num_installed -= 1
        self._answers += [
            AdapterLoaded(request_id=message.request_id, adapters=self.names)
            for message in adapter.waiting
        ]

    def _unknown(self, name: str) -> NotFoundError:
        known = ", ".join(map(repr, self._by_name)) or "none"
        return NotFoundError(f"adapter {name!r} is not loaded; loaded: {known}")


def _attempt(message: LoadAdapter, work: Callable[[], None]) -> Failed | None:
    """Do a part of a load; return the answer to one that failed."""
    try:
        work()
    except MxnError as error:
        return _failed(message, str(error), isinstance(error, UserError), type(error).__name__)
    except Exception as error:  # whatever a chip throws, such as being out of memory
        log.exception("loading adapter %r failed", message.name)
        reason = f"adapter {message.name!r}: {type(error).__name__}: {error}"
        return _failed(message, reason, False, "InternalError")
    return None


def _read_aside(path: str) -> Future[AdapterFiles]:
    """Read an adapter in a thread of its own, which holds up no end of the process."""
    from mxn.models.lora_files import read_adapter

    future: Future[AdapterFiles] = Future()

    def read() -> None:
        try:
            future.set_result(read_adapter(path))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=read, name="adapter-reader", daemon=True).start()
    return future


def refusal(message: LoadAdapter | UnloadAdapter, reason: str) -> Failed:
    """Return the answer of a replica that takes no adapters."""
    return _failed(message, reason, True, "UnsupportedError")


def _failed(
    message: LoadAdapter | UnloadAdapter, reason: str, is_user_error: bool, code: str
) -> Failed:
    """`code` names the class of the error, as for a failed load of a model."""
    return Failed(
        request_id=message.request_id, message=reason, is_user_error=is_user_error, code=code
    )
