"""What profiles and links leave out of a prediction, and how a pipeline is timed. Values only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mxn.train.plan.closed import PipelineTime
from mxn.train.plan.costs import StageCost
from mxn.train.plan.plan import Schedule


class Timer(Protocol):
    """Times one pipeline; `closed.pipeline_time` is one."""

    def __call__(
        self,
        stages: Sequence[StageCost],
        hops: Sequence[tuple[float, float]],
        micro_batches: int,
        schedule: Schedule,
        *,
        chunks: int,
        blocks: bool,
        late_sends: bool,
    ) -> PipelineTime: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What profiles and links leave out. The default adds nothing."""

    hop_slow_down: float = 1.0  # of transfers between stages
    reduce_slow_down: float = 1.0  # of gradient sums
    hops_block: bool = False  # both ends stand still while a transfer runs
    hop_copies: bool = False  # each tensor-parallel device sends the whole activation
    flow_bytes_per_s: float = math.inf  # of one pair of devices; while it lasts both are held
    late_sends: bool = False  # an activation leaves only after the gradient that is due has come
    flat_sums: bool = False  # one ring over all pipelines instead of one in each group
    reduce_overlap: float = 0.0  # share of the last backward that hides a stage's gradient sums
    step_s: float = 0.0  # of a step, whatever it does: loader, optimizer launch, loss reading
