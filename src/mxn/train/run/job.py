"""A training job as the user means it: model, data, batch, optimizer, devices, faults.

Values only: no torch, no files, no clock. `job_file.py` reads one from YAML with errors that name
the line; `Job.to_json` and `Job.from_json` carry it to rank processes. Start at `Job`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mxn.errors import UserError
from mxn.train.plan.plan import Recompute, Schedule

Method = Literal["pretrain", "sft", "lora"]
Dtype = Literal["float32", "bfloat16", "float16"]
Packing = Literal["auto", "stream", "fit", "none"]
Decay = Literal["constant", "linear", "cosine", "wsd"]
SpeedRule = Literal["replan", "stop", "ignore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """`source`: an absolute folder or a hub id. From scratch its config and tokenizer are used."""

    source: str
    begin: Literal["checkpoint", "scratch"] = "checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """LoRA. `targets`: ends of module names such as q_proj, or all-linear."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all-linear",)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    files: tuple[str, ...]  # absolute; a folder stands for its data files
    documents: Literal["file", "paragraph", "line"] = "file"  # of plain text files
    learn: Literal["assistant", "all"] = "assistant"  # of chats
    packing: Packing = "auto"  # documents that share a row; attention never crosses
    shuffle: bool = True
    max_broken: float = 0.01  # share of broken lines above which the job does not start


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    name: Literal["adamw"] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0  # global norm of the gradient; None: not clipped
    schedule: Decay = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None  # of wsd: how many fall at the end; None: a tenth of all
    floor: float = 0.1  # share of `lr` that is left at the last step


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """Devices that are alike. `device` is of the first; `count` ranks follow it.

    cpu: `count` processes on the same processor. cuda:0, sim:0, …: devices from that number on.
    """

    name: str
    device: str
    count: int = 1
    cpu_share: float | None = None  # of one core, by cgroup quota; None: no limit
    threads: int = 1  # of a rank
    pin: bool = False  # its ranks stay on cores that no other rank of this job uses
    memory_bytes: int | None = None  # of a rank; None: what the device has
    link_bytes_per_s: float | None = None  # of a rank's messages, for tests; None: no limit
    dtype: Dtype | None = None  # None: the job's
    watts: float | None = None  # of a rank's device when busy; None: the catalogue's, if any
    price_per_hour: float | None = None  # of a rank's device; None: unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """How the plan comes about: from `file`, or searched under these constraints."""

    file: str | None = None  # absolute; a TrainPlan as JSON
    schedule: Schedule | None = None  # None: the planner's choice
    max_depth: int | None = None  # stages of a pipeline
    recompute: Recompute | None = None
    wire_dtype: Literal["float32", "bfloat16"] = "float32"  # between chips of different makers


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSettings:
    folder: str  # absolute
    every_steps: int | None = 100
    every_seconds: float | None = None
    keep: int = 3
    resume: Literal["newest", "intact", "never"] = "newest"  # intact: pass over broken ones


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultSettings:
    max_restarts: int = 10  # without a new checkpoint in between
    backoff_s: float = 1.0  # doubled by each restart in a row
    max_backoff_s: float = 60.0
    drop_after: int = 3  # failures in a row of one group until the job goes on without it
    grow: bool = True  # take a dropped group back when its device answers again
    grow_every_s: float = 30.0
    stall_s: float = 600.0  # without a step or sign of life, ranks are stopped and restarted


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    parity: bool = True
    speed: SpeedRule = "replan"
    speed_tolerance: float = 0.2  # share by which a layer's time may differ from its profile


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceSettings:
    """Whether micro-batches are shared out again by what the steps measured, and when.

    auto: where the planner chose the shares, not where a plan file did.
    """

    when: Literal["auto", "always", "never"] = "auto"
    every_steps: int = 5  # that a decision is made from
    least_gain: float = 0.005  # share by which a step must become shorter
    open_share: float = 0.0  # of a step's micro-batches: they go to who gets to them first


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingSettings:
    mlflow: str | None = None  # tracking URI; None: only the metrics file
    experiment: str = "mxn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    name: str
    model: ModelSettings
    method: Method
    data: DataSettings
    seq_tokens: int
    micro_batch: int  # rows of a micro-batch
    global_batch: int  # rows of a step
    steps: int | None  # exactly one of the two is set
    epochs: float | None
    devices: tuple[DeviceSettings, ...]  # empty: every device of this machine
    out: str  # absolute
    checkpoint: CheckpointSettings
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    lora: AdapterSettings | None = None
    dtype: Dtype = "float32"
    plan: PlanSettings = field(default_factory=PlanSettings)
    rebalance: RebalanceSettings = field(default_factory=RebalanceSettings)
    gate: GateSettings = field(default_factory=GateSettings)
    faults: FaultSettings = field(default_factory=FaultSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    seed: int = 0
    log: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def micro_batches(self) -> int:
        """Of a step, over all pipelines."""
        return self.global_batch // self.micro_batch

    @property
    def rebalances(self) -> bool:
        """Whether steps may be done with other micro-batches for each pipeline than planned."""
        if self.rebalance.when == "auto":
            return self.plan.file is None
        return self.rebalance.when == "always"

    def dtype_of(self, group: str) -> Dtype:
        """Return what a group computes in. Raises: UserError for an unknown group."""
        return self.group(group).dtype or self.dtype

    def group(self, name: str) -> DeviceSettings:
        """Raises: UserError for a group that the job does not have."""
        for group in self.devices:
            if group.name == name:
                return group
        names = ", ".join(group.name for group in self.devices) or "none (devices: auto)"
        raise UserError(f"no group {name!r} in job {self.name!r}", hint=f"it has: {names}")

    @property
    def fingerprint(self) -> str:
        """Of what a step of training depends on: not devices, plan, folders or number of steps.

        What the data holds is not in it either: `Rows.fingerprint` says that.
        """
        told = json.loads(self.to_json())
        kept = ("model", "method", "seq_tokens", "micro_batch", "global_batch")
        kept += ("optimizer", "lora", "seed")
        text = json.dumps({name: told[name] for name in kept}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Raises: UserError for what is no job."""
        try:
            return _job(json.loads(text))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"this is no training job: {error}") from error


_SECTIONS: dict[str, type] = {
    "model": ModelSettings,
    "data": DataSettings,
    "checkpoint": CheckpointSettings,
    "optimizer": OptimizerSettings,
    "lora": AdapterSettings,
    "plan": PlanSettings,
    "rebalance": RebalanceSettings,
    "gate": GateSettings,
    "faults": FaultSettings,
    "tracking": TrackingSettings,
}


def _job(told: dict[str, Any]) -> Job:
    sections: dict[str, Any] = {
        name: _value(kind, told[name])
        for name, kind in _SECTIONS.items()
        if told.get(name) is not None
    }
    devices = tuple(_value(DeviceSettings, group) for group in told["devices"])
    values: dict[str, Any] = told | sections | {"devices": devices}
    return Job(**values)


def _value(kind: type, told: dict[str, Any]) -> Any:
    """JSON has no tuples: lists of settings become tuples again."""
    names = {item.name for item in fields(kind)}
    if unknown := sorted(told.keys() - names):
        raise TypeError(f"{kind.__name__} has no {unknown[0]!r}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
    return kind(**values)


def metrics_path(job: Job) -> Path:
    """The JSONL file of the job's metrics, one line a step."""
    return Path(job.out) / "metrics.jsonl"


def status_path(job: Job) -> Path:
    """What `mxn train status` reads."""
    return Path(job.out) / "status.json"
