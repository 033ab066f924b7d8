"""What is decided about a training job: who holds which layers and does how many micro-batches.

A plan is a set of pipelines over the same model. Pipelines may differ in everything: chips, number
of stages, cuts, micro-batches. A layer's gradients are summed over the pipelines and divided by the
tokens of the whole batch, so uneven shares give the exact gradient. Immutable, hashable, JSON.
Start at `TrainPlan`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from mxn.errors import UserError

Recompute = Literal["none", "selective", "full"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]

_RECOMPUTE = get_args(Recompute)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Layers `first` to `end` - 1; layer 0 is the embedding, the last one the head."""

    first: int
    end: int

    @property
    def num_layers(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """`tp` neighbouring devices of a group that hold the same chunks together.

    One chunk, except under an interleaved schedule: then chunk c of stage s is the c·S + s-th part
    of the model.
    """

    group: str
    first_device: int  # in its group; devices first_device … first_device + tp - 1
    chunks: tuple[Chunk, ...]
    tp: int = 1
    recompute: Recompute = "none"

    @property
    def num_layers(self) -> int:
        return sum(chunk.num_layers for chunk in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """One copy of the model, cut over its stages, and the micro-batches it does of each step."""

    stages: tuple[Stage, ...]
    micro_batches: int
    # Forwards of each stage ahead of what the schedule needs, to hide slow links; () is none.
    extra_warmup: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    model: str
    num_layers: int  # embedding and head counted
    seq_tokens: int
    micro_batch: int  # rows of a micro-batch, the same everywhere
    pipelines: tuple[Pipeline, ...]
    schedule: Schedule = "1f1b"
    shards_optimizer: bool = False  # each pipeline keeps the optimizer state of a part (ZeRO-1)
    expert_parallel: int = 1  # pipelines that share out the experts of a layer

    @property
    def num_devices(self) -> int:
        return sum(stage.tp for pipeline in self.pipelines for stage in pipeline.stages)

    @property
    def micro_batches(self) -> int:
        """Of a step, over all pipelines."""
        return sum(pipeline.micro_batches for pipeline in self.pipelines)

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batches * self.micro_batch * self.seq_tokens

    @property
    def uneven_layers(self) -> frozenset[int]:
        """Layers that pipelines hold at different widths: their gradients are summed whole."""
        if len({stage.tp for pipeline in self.pipelines for stage in pipeline.stages}) < 2:
            return frozenset()
        rows = {tuple((s.chunks, s.tp) for s in pipeline.stages) for pipeline in self.pipelines}
        widths: list[set[int]] = [set() for _ in range(self.num_layers)]
        for row in rows:
            for chunks, tp in row:
                for chunk in chunks:
                    for layer in range(chunk.first, chunk.end):
                        widths[layer].add(tp)
        return frozenset(layer for layer, found in enumerate(widths) if len(found) > 1)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TrainPlan:
        """Raises: UserError for what is no plan."""
        try:
            plan = _plan(json.loads(text))
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"this is no training plan: {error}") from error
        plan.check()
        return plan

    def check(self) -> None:
        """Raises: UserError when a pipeline does not cover each layer once, in order, or a device
        is used twice, or a count or a word is none that a plan can have.
        """
        self._check_counts()
        for number, pipeline in enumerate(self.pipelines):
            warmup = pipeline.extra_warmup
            if warmup and len(warmup) != len(pipeline.stages):
                raise UserError(
                    f"pipeline {number} has {len(pipeline.stages)} stages and extra warm-up "
                    f"for {len(warmup)}"
                )
            depth = len(pipeline.stages[0].chunks)
            if any(len(stage.chunks) != depth for stage in pipeline.stages):
                raise UserError(f"the stages of pipeline {number} have different numbers of chunks")
            if depth > 1 and self.schedule in ("gpipe", "1f1b"):
                raise UserError(
                    f"the stages of pipeline {number} have {depth} chunks, {self.schedule} has one",
                    hint="the schedules with chunks are interleaved and zero-bubble",
                )
            row = [stage.chunks[c] for c in range(depth) for stage in pipeline.stages]
            at = 0
            for chunk in row:
                if chunk.first != at or chunk.end <= chunk.first:
                    raise UserError(
                        f"pipeline {number} holds layers {chunk.first} to {chunk.end - 1} "
                        f"where layer {at} is next"
                    )
                at = chunk.end
            if at != self.num_layers:
                raise UserError(f"pipeline {number} ends at layer {at} of {self.num_layers}")
        self._check_devices()

    def _check_counts(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise UserError(
                f"unknown schedule {self.schedule!r}",
                hint=f"one of {', '.join(get_args(Schedule))}",
            )
        if not self.pipelines:
            raise UserError("a plan has at least one pipeline")
        if min(self.micro_batch, self.seq_tokens, self.expert_parallel) < 1:
            raise UserError(
                f"micro-batches of {self.micro_batch} rows of {self.seq_tokens} tokens, "
                f"expert_parallel {self.expert_parallel}: each is at least 1"
            )
        for number, pipeline in enumerate(self.pipelines):
            if pipeline.micro_batches < 1:
                raise UserError(f"pipeline {number} has no micro-batch")
            if not pipeline.stages:
                raise UserError(f"pipeline {number} has no stage")
            if pipeline.extra_warmup and min(pipeline.extra_warmup) < 0:
                raise UserError(f"extra_warmup of pipeline {number} is {pipeline.extra_warmup}")
            for stage in pipeline.stages:
                if stage.tp < 1 or stage.first_device < 0:
                    raise UserError(
                        f"pipeline {number} has a stage of {stage.tp} devices from "
                        f"{stage.first_device} of group {stage.group!r} on"
                    )
                if stage.recompute not in _RECOMPUTE:
                    raise UserError(
                        f"unknown recomputation {stage.recompute!r}",
                        hint=f"one of {', '.join(_RECOMPUTE)}",
                    )

    def _check_devices(self) -> None:
        taken: set[tuple[str, int]] = set()
        for pipeline in self.pipelines:
            for stage in pipeline.stages:
                for device in range(stage.first_device, stage.first_device + stage.tp):
                    if (stage.group, device) in taken:
                        raise UserError(f"device {device} of group {stage.group!r} is used twice")
                    taken.add((stage.group, device))


def _fields(data: dict[str, Any], numbers: tuple[str, ...]) -> dict[str, Any]:
    """Return a copy. Raises: TypeError when one of `numbers` is there and no whole number."""
    rest: dict[str, Any] = dict(data)
    for name in numbers:
        value = rest.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, expected a whole number")
    return rest


def _plan(data: dict[str, Any]) -> TrainPlan:
    rest = _fields(data, ("num_layers", "seq_tokens", "micro_batch", "expert_parallel"))
    pipelines = tuple(map(_pipeline, rest.pop("pipelines")))
    return TrainPlan(pipelines=pipelines, **rest)


def _pipeline(data: dict[str, Any]) -> Pipeline:
    rest = _fields(data, ("micro_batches",))
    stages = tuple(map(_stage, rest.pop("stages")))
    warmup = tuple(rest.pop("extra_warmup", ()))
    return Pipeline(stages=stages, extra_warmup=warmup, **rest)


def _stage(data: dict[str, Any]) -> Stage:
    rest = _fields(data, ("first_device", "tp"))
    chunks = tuple(Chunk(**_fields(chunk, ("first", "end"))) for chunk in rest.pop("chunks"))
    return Stage(chunks=chunks, **rest)
