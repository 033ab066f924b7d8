"""The model of a job as trainer and planner see it: what it holds, and what of it is trained.

Reads configs and rows, never weights. Start at `look_at`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mxn.train.plan.memory import FLOAT32, MIXED, SAVED_BYTES, MemoryModel
from mxn.train.plan.shape import ModelShape
from mxn.train.run.job import Dtype, Job
from mxn.train.run.measured import Model

if TYPE_CHECKING:
    from mxn.train.run.weights import ModelSource

_ROWS_LOOKED_AT = 4  # micro-batches, to see whether any row holds more than one document


def look_at(job: Job) -> tuple[Model, ModelShape, bool, float]:
    """Return the model of a job as trainer and planner see it, whether its rows are packed, and
    the share of its weights that is trained.
    """
    from types import SimpleNamespace

    from mxn.train.run.from_job import open_rows, open_source
    from mxn.train.shapes import biases_of, model_shape

    source = open_source(job)
    rows = open_rows(job, source)
    looked_at = min(_ROWS_LOOKED_AT, rows.micro_batches_per_epoch)
    is_packed = any(rows.micro_batch(index).is_packed for index in range(looked_at))
    biases = biases_of(source.family.name, SimpleNamespace(**source.config_json))
    shape = model_shape(
        source.spec, name=source.folder.name, seq_tokens=job.seq_tokens, dtype=job.dtype,
        biases=biases, is_packed=is_packed,
    )  # fmt: skip
    share = 1.0 if job.lora is None else trainable_params(job, source) / shape.params
    model = Model(spec=source.spec, names=source.family.names, biases=source.biases)
    return model, shape, is_packed, share


def trainable_params(job: Job, source: ModelSource) -> int:
    """Return how many weights a LoRA job trains. Takes no memory."""
    from mxn.train.run.lora import LoraSettings, attach
    from mxn.train.run.optim import trainable
    from mxn.train.shapes import layer_kinds

    assert job.lora is not None
    lora = LoraSettings(rank=job.lora.rank, alpha=job.lora.alpha, targets=tuple(job.lora.targets))
    kinds = layer_kinds(source.spec)
    total = 0
    for kind in set(kinds):
        layer = kinds.index(kind)
        stage = source.empty_stage(layer, layer + 1, device="meta")
        attach(stage, lora, seed=job.seed)
        total += kinds.count(kind) * sum(p.numel() for p in trainable(stage).values())
    return total


def memory_of(
    job: Job, *, trainable_share: float = 1.0, dtype: Dtype | None = None, is_on_host: bool = False
) -> MemoryModel:
    """Return what the trainer keeps for each parameter in a dtype, default the job's.

    `is_on_host`: on the processor, whose memory also takes what a save copies.
    """
    like = FLOAT32 if (dtype or job.dtype) == "float32" else MIXED
    saved_bytes = SAVED_BYTES if is_on_host else 0.0
    return replace(like, trainable_share=trainable_share, saved_bytes=saved_bytes)
