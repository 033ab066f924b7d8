"""Small real jobs for tests that start ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mxn.train.run.from_job import open_job
from mxn.train.run.job import (
    CheckpointSettings,
    DataSettings,
    DeviceSettings,
    Job,
    ModelSettings,
    OptimizerSettings,
)
from mxn.train.run.single import SingleTrainer
from support import parity_cases


def small_job(out: Path, steps: int, devices: list[DeviceSettings], **changes: Any) -> Job:
    """Return the job of `parity_cases`: eight micro-batches of one row."""
    optimizer = OptimizerSettings(
        lr=3e-3, betas=(0.9, 0.95), warmup_steps=3, schedule="cosine", floor=0.0
    )
    settings: dict[str, Any] = {
        "name": "small",
        "model": ModelSettings(source=str(parity_cases.small_model()), begin="scratch"),
        "method": "pretrain",
        "data": DataSettings(files=(str(parity_cases.TEXT),)),
        "seq_tokens": parity_cases.SEQ_TOKENS,
        "micro_batch": parity_cases.MICRO_BATCH,
        "global_batch": 8 * parity_cases.MICRO_BATCH,
        "steps": steps,
        "epochs": None,
        "devices": tuple(devices),
        "out": str(out),
        "checkpoint": CheckpointSettings(folder=str(out / "checkpoints"), every_steps=3),
        "optimizer": optimizer,
        "seed": 5,
    }
    return Job(**settings | changes)


def on_one_device(job: Job) -> list[float]:
    """Return the losses of a job's steps on one device."""
    opened = open_job(job)
    trainer = SingleTrainer(opened.source, opened.rows, opened.settings)
    return [log.loss for log in trainer.run()]


def group(name: str = "all", device: str = "cpu", count: int = 1, **more: Any) -> DeviceSettings:
    return DeviceSettings(name=name, device=device, count=count, **more)
