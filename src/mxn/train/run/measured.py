"""What is to be measured for a job, and under which conditions. Values only, sent to the ranks.

Knows no clock and starts nothing: `measure.py` does. Start at `Request`.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mxn
from mxn.chips.chip import Device
from mxn.chips.registry import chip_of
from mxn.models.names import Names
from mxn.models.spec import DecoderSpec
from mxn.train.plan.profile import LayerCost
from mxn.train.run.job import DeviceSettings, Job
from mxn.train.run.stored import Reading

_CODE = ("net/*.py", "optim.py", "lora.py", "chains.py", "layer_times.py", "rounds.py")
_LINK_CODE = ("bridge.py", "islands.py", "wire.py", "staging.py", "link_times.py")
_DRIVER_FILES = {
    "nvidia": "/proc/driver/nvidia/version",
    "ascend": "/usr/local/Ascend/driver/version.info",
    "amd": "/sys/module/amdgpu/version",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One rank of a measurement: a device of a group, in the process it will have in the job."""

    rank: int
    group: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a rank needs of the model. Pickled beside the request: reading configs takes seconds."""

    spec: DecoderSpec
    names: Names
    biases: frozenset[str]


MODEL_FILE = "model.pickle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What every rank of a measurement is told. JSON through `to_json` and `from_json`."""

    job: str  # a Job as JSON
    members: tuple[Member, ...]
    micro_batches: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]  # of ranks whose link is wanted
    blocks: int
    block_s: float
    seconds: float  # to go on for while rounds differ; 0: one round
    is_packed: bool  # rows hold several documents, so attention has a mask
    has_layers: bool = True  # False: links only
    tps: tuple[int, ...] = (1,)  # tensor parallelism; a group has those it is wide enough for

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        told = json.loads(text)
        members = tuple(Member(**member) for member in told["members"])
        pairs = tuple((a, b) for a, b in told["pairs"])
        return cls(**told | {
            "members": members, "pairs": pairs, "micro_batches": tuple(told["micro_batches"]),
            "tps": tuple(told["tps"]),
        })  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one rank measured."""

    rank: int
    framework_bytes: float
    readings: tuple[Reading, ...]
    links: tuple[dict[str, Any], ...]  # first, second, link, noise

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Answer:
        told = json.loads(text)
        readings = tuple(
            Reading(**row | {"cost": LayerCost(**row["cost"])}) for row in told["readings"]
        )
        return cls(**told | {"readings": readings, "links": tuple(told["links"])})


def chip_label(job: Job, group: DeviceSettings, device: Device) -> str:
    """Return what the planner calls the devices of a group: the chip, and what slows it.

    Groups of one label have the same profile: ``x86-avx512``, ``x86-avx512@0.5``, ``sim``.
    """
    label = device.chip
    if group.cpu_share is not None:
        label += f"@{group.cpu_share:g}"
    if group.threads != 1:
        label += f"x{group.threads}"
    if group.dtype is not None and group.dtype != job.dtype:
        label += f":{group.dtype}"
    return label


def basis_of(group: DeviceSettings, device: Device) -> str:
    """Return `simulated` for simulated chips and for shares of a CPU, else `measured`."""
    is_share = group.cpu_share is not None
    return "simulated" if is_share or chip_of(device.vendor).basis == "simulated" else "measured"


def layers_key(
    job: Job,
    group: DeviceSettings,
    device: Device,
    spec: DecoderSpec,
    company: Iterable[str],
    *,
    is_packed: bool,
) -> dict[str, Any]:
    """Return all that the times of the layers on a device of `group` depend on.

    `company`: the labels of ranks that compute on the same processor at the same time.
    """
    return {
        "chip": device.chip,
        "device": device.name,
        "driver": driver_of(device.vendor),
        "torch": _version("torch"),
        "threads": group.threads,
        "pin": group.pin,
        "cpu_share": group.cpu_share,
        "dtype": job.dtype_of(group.name),
        "model": _digest(asdict(spec)),
        "seq_tokens": job.seq_tokens,
        "is_packed": is_packed,
        "lora": asdict(job.lora) if job.lora else None,
        "company": sorted(company),
        "mxn": revision(_CODE),
    }


def link_key(job: Job, ends: Iterable[tuple[DeviceSettings, Device]]) -> dict[str, Any]:
    """Return all that the link between two devices, each with its group, depends on."""
    sides = [
        {
            "chip": device.chip,
            "device": device.id,
            "name": device.name,
            "driver": driver_of(device.vendor),
            "cpu_share": group.cpu_share,
            "limit": group.link_bytes_per_s,
        }
        for group, device in ends
    ]
    return {
        "ends": sorted(sides, key=lambda side: json.dumps(side, sort_keys=True)),
        "host": platform.node(),
        "torch": _version("torch"),
        "wire_dtype": job.plan.wire_dtype,
        "mxn": revision(_LINK_CODE),
    }


@cache
def revision(patterns: tuple[str, ...]) -> str:
    """Return mxn's version and a digest of the code that runs while it is measured."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            digest.update(path.read_bytes())
    return f"{mxn.__version__}+{digest.hexdigest()[:12]}"


@cache
def driver_of(vendor: str) -> str:
    """Return the version of a vendor's driver; where none is known to tell, that of the kernel."""
    path = Path(_DRIVER_FILES.get(vendor, ""))
    return path.read_text().strip() if path.is_file() else platform.release()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
