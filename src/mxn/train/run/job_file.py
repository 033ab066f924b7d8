"""Reads job.yaml into a `Job`. What is wrong with it is said with file:line. Start at `read_job`.

Files that are read (data, a plan, a config) are sought beside the job file; `out` is sought where
the command runs, as with any program. Opens no model and no data: that they exist is checked here,
what is in them where they are used. What each key may be is in `job_keys.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mxn.errors import ConfigError
from mxn.train.run import yaml_marks as y
from mxn.train.run.job import AdapterSettings, CheckpointSettings, Job, OptimizerSettings
from mxn.train.run.job_keys import KEYS


def read_job(path: Path, *, out: Path | None = None) -> Job:
    """Return the job of a file; `out` overrides its folder.

    Raises: ConfigError with file:line, the value and what is allowed; NotFoundError for no file.
    """
    root = y.load(path)
    told = y.read_section(root, KEYS, ("model", "data", "seq_tokens", "global_batch", "devices"))
    told.setdefault("name", path.stem)
    told.setdefault("method", "pretrain")
    told.setdefault("micro_batch", 1)
    _check_length(root, told)
    _check_batch(root, told)
    _check_lora(root, told)
    folder = out or Path(told.get("out") or f"runs/{told['name']}")
    told["out"] = str(folder.absolute())
    checkpoint = {"folder": str(folder.absolute() / "checkpoints")} | told.get("checkpoint", {})
    told["checkpoint"] = CheckpointSettings(**checkpoint)
    return Job(**told)


def _entry(root: y.Entry, name: str) -> y.Entry:
    return next((value for key, value in root.items() if key.key == name), root)


def _check_length(root: y.Entry, told: dict[str, Any]) -> None:
    if ("steps" in told) == ("epochs" in told):
        raise ConfigError(
            f"{root.file}:{_entry(root, 'steps').line}: give either steps or epochs, "
            + ("not both" if "steps" in told else "there is neither")
        )
    told.setdefault("steps", None)
    told.setdefault("epochs", None)


def _check_batch(root: y.Entry, told: dict[str, Any]) -> None:
    rows, micro = told["global_batch"], told["micro_batch"]
    if rows % micro:
        raise _entry(root, "global_batch").wrong(
            f"rows are no multiple of micro_batch ({micro})",
            hint=f"global_batch: {-(-rows // micro) * micro}",
        )
    warmup = told.get("optimizer", OptimizerSettings()).warmup_steps
    if told["steps"] is not None and warmup > told["steps"]:
        raise _entry(root, "optimizer").wrong(
            f"has warmup_steps {warmup}, more than the job's steps ({told['steps']})"
        )


def _check_lora(root: y.Entry, told: dict[str, Any]) -> None:
    if told["method"] == "lora":
        told.setdefault("lora", AdapterSettings())
    elif "lora" in told:
        raise _entry(root, "lora").wrong(
            f"is given, but method is {told['method']!r}", hint="method: lora"
        )
    if told["method"] != "pretrain" and told["model"].begin == "scratch":
        raise _entry(root, "model").wrong(
            f"begins from scratch, but method {told['method']!r} goes on from trained weights",
            hint="method: pretrain, or begin: checkpoint",
        )
