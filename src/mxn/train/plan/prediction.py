"""What a plan is predicted to do: times, memory, cost, each with what it was made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePrediction:
    """One stage of one pipeline. Times are seconds of a step, bytes are of one device."""

    pipeline: int
    stage: int
    busy_s: float  # computing, all micro-batches
    send_s: float  # activations and gradients to its neighbours
    reduce_s: float  # gradients over the pipelines
    optimizer_s: float
    memory_bytes: float
    memory_limit_bytes: int

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.memory_limit_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One step of a plan."""

    iteration_s: float
    pipeline_s: float  # until the last backward of the slowest pipeline
    reduce_s: float  # not hidden behind the pipelines
    optimizer_s: float
    tokens_per_s: float
    bubble: float  # share of the devices' time in `pipeline_s` that no compute fills, 0 to 1
    stages: tuple[StagePrediction, ...]
    mfu: float | None  # None: a chip's peak is unknown
    energy_j: float | None
    cost_micro: float | None
    basis: str  # the weakest of what it was made from

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)
