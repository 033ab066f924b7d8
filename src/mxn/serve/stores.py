"""What a server keeps besides usage: files, batches, answers. In its database where it has one.

Without a database answers are kept in memory, and files and batches are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mxn.serve.responses.background import Background
from mxn.serve.responses.store import MemoryStore, ResponseStore, SqlStore

if TYPE_CHECKING:
    from mxn.ledger.database import Database
    from mxn.serve.batch.files import FileStore
    from mxn.serve.batch.store import BatchStore
    from mxn.serve.batch.worker import BatchWorker, Call


@dataclass(slots=True)
class Stores:
    responses: ResponseStore = field(default_factory=MemoryStore)
    files: FileStore | None = None
    batches: BatchStore | None = None
    worker: BatchWorker | None = None
    background: Background = field(init=False)  # answers that are made while nobody waits

    def __post_init__(self) -> None:
        self.background = Background(self.responses)

    @classmethod
    def on(cls, database: Database, call: Call, *, gateway_id: str) -> Stores:
        """Keep everything in `database`; `call` runs one line of a batch in this process."""
        from mxn.serve.batch.files import FileStore
        from mxn.serve.batch.store import BatchStore
        from mxn.serve.batch.worker import BatchWorker
        from mxn.serve.responses.takeover import Abandoned

        files, batches = FileStore(database), BatchStore(database)
        worker = BatchWorker(files, batches, call, gateway_id=gateway_id)
        stores = cls(SqlStore(database, gateway_id=gateway_id), files, batches, worker)
        abandoned = Abandoned(database, gateway_id)
        stores.background = Background(stores.responses, abandoned.sweep)
        return stores
