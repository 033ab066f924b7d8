"""What each key of a job file may hold: readers that say file:line where a value is none.

Knows single values and sections; how sections must fit together is in `job_file.py`. Start at
`KEYS`.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from mxn.train.run import yaml_marks as y
from mxn.train.run.job import (
    AdapterSettings,
    DataSettings,
    DeviceSettings,
    FaultSettings,
    GateSettings,
    ModelSettings,
    OptimizerSettings,
    PlanSettings,
    RebalanceSettings,
    TrackingSettings,
)
from mxn.train.run.login import take_login

_DTYPE = y.one_of("float32", "bfloat16", "float16")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_DEVICE = re.compile(r"[a-z][a-z0-9_]*(:\d+)?")


# What a value is called in the file, where the field says its unit.
_FIELD_OF = {"memory": "memory_bytes", "link": "link_bytes_per_s"}


def _settings(kind: type, readers: dict[str, y.Reader], *required: str) -> y.Reader:
    """Return a reader of a mapping into a dataclass; each of its fields needs a reader."""
    missing = {item.name for item in dataclasses.fields(kind)}
    missing -= {_FIELD_OF.get(key, key) for key in readers}
    assert not missing, f"no reader for {sorted(missing)} of {kind.__name__}"

    def read(entry: y.Entry) -> Any:
        told = y.read_section(entry, readers, required)
        return kind(**{_FIELD_OF.get(key, key): value for key, value in told.items()})

    return read


def _name(entry: y.Entry) -> str:
    value = y.text(entry)
    if not _NAME.fullmatch(value):
        raise entry.wrong("is no name: letters, digits, '_', '-' and '.', the first no sign")
    return value


def _beside(entry: y.Entry) -> str:
    """A file that must exist, sought beside the job file."""
    path = (entry.file.parent / Path(y.text(entry)).expanduser()).absolute()
    if not path.is_file():
        raise entry.wrong(f"is no file (sought at {path})")
    return str(path.resolve())


def _data_file(entry: y.Entry) -> str:
    """A file or a folder of files, sought beside the job file."""
    path = (entry.file.parent / Path(y.text(entry)).expanduser()).absolute()
    if not path.exists():
        raise entry.wrong(f"is no file and no folder (sought at {path})")
    return str(path.resolve())


def _model_name(entry: y.Entry) -> str:
    """A folder beside the job file, or a model that ships with mxn; else it is left for the hub."""
    from mxn.models.catalogue import shipped_dir

    value = y.text(entry)
    path = entry.file.parent / Path(value).expanduser()
    shipped = shipped_dir() / value
    if path.exists():
        return str(path.resolve())
    return str(shipped) if (shipped / "config.json").is_file() else value


def _model(entry: y.Entry) -> ModelSettings:
    if not entry.is_mapping:
        return ModelSettings(source=_model_name(entry))
    return _MODEL(entry)


def _device_name(entry: y.Entry) -> str:
    value = y.text(entry)
    if not _DEVICE.fullmatch(value):
        raise entry.wrong("is no device; examples: cpu, cuda:0, npu:2, sim:0")
    return value


def _devices(entry: y.Entry) -> tuple[DeviceSettings, ...]:
    if entry.value == "auto":
        return ()
    groups: list[DeviceSettings] = []
    elements = entry.elements() if not entry.is_text else []
    if not elements:
        raise entry.wrong("must be auto, or a list of groups such as {name: a, device: cpu}")
    for element in elements:
        group = _GROUP(element)
        if any(group.name == other.name for other in groups):
            raise element.wrong(f"has the name {group.name!r}, which another group has too")
        if group.cpu_share is not None and not group.device.startswith("cpu"):
            raise element.wrong(f"has a cpu_share, but device {group.device!r} is no processor")
        if group.pin and not group.device.startswith("cpu"):
            raise element.wrong(f"has pin, but device {group.device!r} is no processor")
        groups.append(group)
    _check_overlap(entry, groups)
    return tuple(groups)


def _check_overlap(entry: y.Entry, groups: list[DeviceSettings]) -> None:
    taken: dict[str, str] = {}
    for group in groups:
        kind, _, first = group.device.partition(":")
        if kind == "cpu":
            continue  # processes share a processor
        for number in range(int(first or 0), int(first or 0) + group.count):
            device = f"{kind}:{number}"
            if device in taken:
                raise entry.wrong(f"give {device} to both {taken[device]!r} and {group.name!r}")
            taken[device] = group.name


def _plan(entry: y.Entry) -> PlanSettings:
    if entry.value == "auto":
        return PlanSettings()
    if entry.is_text:
        return PlanSettings(file=_beside(entry))
    told = y.read_section(entry, _PLAN_KEYS)
    if "file" in told and told.keys() - {"file", "wire_dtype"}:
        raise entry.wrong("names a file, which leaves nothing to constrain but wire_dtype")
    return PlanSettings(**told)


def _rebalance(entry: y.Entry) -> RebalanceSettings:
    """`auto`, a switch, or how: then it is wanted."""
    if entry.value == "auto":
        return RebalanceSettings()
    if not entry.is_mapping:
        if not isinstance(entry.value, bool):
            raise entry.wrong("must be auto, true, false, or {every_steps: …, least_gain: …}")
        return RebalanceSettings(when="always" if entry.value else "never")
    return RebalanceSettings(when="always", **y.read_section(entry, _REBALANCE_KEYS))


def _folder(entry: y.Entry) -> str:
    return str(Path(y.text(entry)).expanduser().absolute())


def _server(entry: y.Entry) -> str:
    """A tracking address; a name and a password in it do not become part of the job."""
    return take_login(y.text(entry))


_TRACKING = _settings(TrackingSettings, {"mlflow": y.optional(_server), "experiment": y.text})


def _tracking(entry: y.Entry) -> TrackingSettings:
    """What stands in its place is not shown: it may be an address with a password."""
    if not entry.is_mapping:
        raise entry.wrong("is no mapping of keys to values", "{mlflow: …}", is_shown=False)
    return _TRACKING(entry)


def _betas(entry: y.Entry) -> tuple[float, float]:
    values = y.list_of(y.number(0, 0.999999))(entry)
    if len(values) != 2:
        raise entry.wrong(f"needs two numbers, has {len(values)}")
    return values[0], values[1]


_MODEL = _settings(
    ModelSettings,
    {"source": _model_name, "begin": y.one_of("checkpoint", "scratch")},
    "source",
)

_GROUP = _settings(
    DeviceSettings,
    {
        "name": _name,
        "device": _device_name,
        "count": y.whole(1, 10_000),
        "cpu_share": y.optional(y.number(0, 1024, is_open=True)),
        "threads": y.whole(1, 1024),
        "pin": y.switch,
        "memory": y.optional(y.size),
        "link": y.optional(y.rate),
        "dtype": y.optional(_DTYPE),
        "watts": y.optional(y.number(0, is_open=True)),
        "price_per_hour": y.optional(y.number(0, is_open=True)),
    },
    "name",
    "device",
)

_PLAN_KEYS: dict[str, y.Reader] = {
    "file": _beside,
    "schedule": y.one_of("gpipe", "1f1b", "interleaved", "zero-bubble"),
    "max_depth": y.whole(1),
    "recompute": y.one_of("none", "selective", "full"),
    "wire_dtype": y.one_of("float32", "bfloat16"),
}

_REBALANCE_KEYS: dict[str, y.Reader] = {
    "every_steps": y.whole(1),
    "least_gain": y.number(0, 1),
    "open_share": y.number(0, 0.9),
}

KEYS: dict[str, y.Reader] = {
    "name": _name,
    "model": _model,
    "method": y.one_of("pretrain", "sft", "lora"),
    "lora": _settings(
        AdapterSettings,
        {
            "rank": y.whole(1, 4096),
            "alpha": y.number(0, is_open=True),
            "targets": y.list_of(y.text),
        },
    ),
    "data": _settings(
        DataSettings,
        {
            "files": y.list_of(_data_file),
            "documents": y.one_of("file", "paragraph", "line"),
            "learn": y.one_of("assistant", "all"),
            "packing": y.one_of("auto", "stream", "fit", "none"),
            "shuffle": y.switch,
            "max_broken": y.number(0, 1),
        },
        "files",
    ),
    "seq_tokens": y.whole(2),
    "micro_batch": y.whole(1),
    "global_batch": y.whole(1),
    "steps": y.whole(1),
    "epochs": y.number(0, is_open=True),
    "optimizer": _settings(
        OptimizerSettings,
        {
            "name": y.one_of("adamw"),
            "lr": y.number(0, is_open=True),
            "betas": _betas,
            "eps": y.number(0, is_open=True),
            "weight_decay": y.number(0),
            "clip": y.optional(y.number(0, is_open=True)),
            "schedule": y.one_of("constant", "linear", "cosine", "wsd"),
            "warmup_steps": y.whole(0),
            "decay_steps": y.optional(y.whole(0)),
            "floor": y.number(0, 1),
        },
    ),
    "dtype": _DTYPE,
    "devices": _devices,
    "plan": _plan,
    "rebalance": _rebalance,
    "out": y.text,
    "checkpoint": lambda entry: y.read_section(
        entry,
        {
            "folder": _folder,
            "every_steps": y.optional(y.whole(1)),
            "every_seconds": y.optional(y.number(0, is_open=True)),
            "keep": y.whole(1),
            "resume": y.one_of("newest", "intact", "never"),
        },
    ),
    "gate": _settings(
        GateSettings,
        {
            "parity": y.switch,
            "speed": y.one_of("replan", "stop", "ignore"),
            "speed_tolerance": y.number(0, is_open=True),
        },
    ),
    "faults": _settings(
        FaultSettings,
        {
            "max_restarts": y.whole(0),
            "backoff_s": y.number(0),
            "max_backoff_s": y.number(0),
            "drop_after": y.whole(1),
            "grow": y.switch,
            "grow_every_s": y.number(0, is_open=True),
            "stall_s": y.number(0, is_open=True),
        },
    ),
    "tracking": _tracking,
    "seed": y.whole(0, 2**63 - 1),
    "log": y.one_of("debug", "info", "warning", "error"),
}
