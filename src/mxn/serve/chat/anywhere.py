"""One chat on whatever serves the model: our own replicas, or a foreign server's.

Protocols that write their own events from a `ChatRun` start here and need not know which it is.
"""

from __future__ import annotations

import msgspec

from mxn.serve.chat.events import ChatRun
from mxn.serve.chat.run import start_chat
from mxn.serve.context import current
from mxn.serve.openai.types import ChatRequest
from mxn.serve.state import State, new_id, note_model


async def start_anywhere(state: State, body: ChatRequest, *, prefix: str) -> ChatRun:
    """Return the run of a chat; its id begins with `prefix`. Raises: ApiError, MxnError."""
    foreign = state.upstreams.get(body.model) if body.model else None
    if foreign is None:
        job_id = f"{prefix}{new_id('')[1:]}"
        return await start_chat(state, body, state.find(body.model), job_id=job_id)
    note_model(foreign.name, foreign.name)
    fields = {key: value for key, value in msgspec.to_builtins(body).items() if value is not None}
    return await foreign.run(msgspec.json.encode(fields), current().ledger, prefix=prefix)
