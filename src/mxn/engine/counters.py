"""What a replica has done since it started. Plain numbers; `stats` turns them into a message."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from mxn.engine.protocol import EngineStats


@dataclass(slots=True)
class Counters:
    """Totals; the names are those of `EngineStats`."""

    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generation_tokens_total: int = 0
    requests_total: int = 0
    requests_cancelled_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    drafts_total: int = 0
    draft_tokens_total: int = 0
    accepted_draft_tokens_total: int = 0
    undrafted_requests_total: int = 0
    busy_s: float = 0.0

    def stats(self, request_id: str, **gauges: int) -> EngineStats:
        """Return the totals together with what is true now, such as `num_running`."""
        return EngineStats(request_id=request_id, **asdict(self), **gauges)
