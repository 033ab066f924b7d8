"""From a `Job` to what trains: model source, rows, settings. Every rank makes the same ones.

Knows no devices, plans or ranks. Start at `open_job`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from mxn.errors import UserError
from mxn.models.hub import resolve
from mxn.models.tokenizer import Tokenizer
from mxn.train.run.data import DataSettings, Rows, TokenCache, prepare
from mxn.train.run.job import Job
from mxn.train.run.lora import LoraSettings, check_targets, targeted
from mxn.train.run.optim import AdamSettings
from mxn.train.run.schedule import Schedule
from mxn.train.run.single import RunSettings
from mxn.train.run.weights import ModelSource

log = logging.getLogger("mxn.train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    source: ModelSource
    rows: Rows
    settings: RunSettings

    @property
    def num_steps(self) -> int:
        return self.settings.schedule.num_steps


def open_job(job: Job) -> Opened:
    """Open model and data of a job; on the first call the data is tokenized.

    Raises: UserError and its kinds for a model or data that cannot be trained.
    """
    source = open_source(job)
    rows = open_rows(job, source)
    settings = run_settings(job, rows)
    if settings.lora is not None:
        _check_adapters(source, settings.lora)
    return Opened(source=source, rows=rows, settings=settings)


def _check_adapters(source: ModelSource, settings: LoraSettings) -> None:
    """Look at the whole model: a rank sees a part of it, where a target may rightly be missing.

    Raises: UnsupportedError for a target that no matrix answers; the job would train nothing.
    """
    whole = source.empty_stage(0, source.num_layers, device="meta")
    check_targets(settings, targeted(whole, settings))


def open_source(job: Job) -> ModelSource:
    return ModelSource.open(
        job.model.source, seq_tokens=job.seq_tokens, begin=job.model.begin, seed=job.seed
    )


def open_rows(job: Job, source: ModelSource) -> Rows:
    """Raises: UserError when more lines are broken than the job allows."""
    settings = DataSettings(
        paths=tuple(Path(file) for file in job.data.files),
        documents=job.data.documents,
        learn=job.data.learn,
    )
    tokenizer = Tokenizer.load(resolve(str(source.folder)))
    cache = prepare(settings, tokenizer, source.spec.vocab_size)
    _check_broken(job, cache)
    rows = Rows(
        cache,
        seq_tokens=job.seq_tokens,
        micro_batch=job.micro_batch,
        seed=job.seed,
        packing=job.data.packing,
        shuffle=job.data.shuffle,
    )
    if rows.num_cut:
        log.warning(
            "%d of %d documents are longer than a row (seq_tokens %d): %d have nothing to learn "
            "in it and are left out, the others lose their end",
            rows.num_cut, cache.num_documents, job.seq_tokens, rows.num_lost,
        )  # fmt: skip
    return rows


def run_settings(job: Job, rows: Rows) -> RunSettings:
    """Return what a job does with its rows; epochs become steps here."""
    steps = job.steps
    if steps is None:
        assert job.epochs is not None
        steps = rows.num_steps(job.epochs, job.micro_batches)
    chosen = job.optimizer
    lora = None
    if job.lora is not None:
        lora = LoraSettings(rank=job.lora.rank, alpha=job.lora.alpha, targets=job.lora.targets)
    return RunSettings(
        schedule=Schedule(
            peak=chosen.lr,
            num_steps=steps,
            shape=chosen.schedule,
            warmup_steps=chosen.warmup_steps,
            decay_steps=chosen.decay_steps,
            floor=chosen.floor,
        ),
        micro_batches=job.micro_batches,
        adam=AdamSettings(
            beta1=chosen.betas[0],
            beta2=chosen.betas[1],
            eps=chosen.eps,
            weight_decay=chosen.weight_decay,
        ),
        clip_norm=chosen.clip,
        lora=lora,
        seed=job.seed,
    )


def _check_broken(job: Job, cache: TokenCache) -> None:
    skipped = cache.skipped
    if not skipped.count:
        return
    share = skipped.count / (skipped.count + cache.num_documents)
    examples = "; ".join(f"{place}: {reason}" for place, reason in skipped.examples)
    log.warning("%d broken lines are left out (%.2g %%): %s", skipped.count, 100 * share, examples)
    if share > job.data.max_broken:
        raise UserError(
            f"{skipped.count} lines of the data are broken ({100 * share:.2g} %), more than "
            f"max_broken allows ({100 * job.data.max_broken:g} %): {examples}",
            hint="repair them, or raise data: {max_broken: …}",
        )


def facts(job: Job, opened: Opened) -> dict[str, object]:
    """Return what a checkpoint of this job tells of itself, and a tracker as parameters."""
    return settings_of(job) | {"rows": opened.rows.fingerprint}


def settings_of(job: Job) -> dict[str, object]:
    """Return what of a job decides its steps, its data left out."""
    told = json.loads(job.to_json())
    return {
        "method": job.method,
        "model": job.model.source,
        "begin": job.model.begin,
        "seq_tokens": job.seq_tokens,
        "micro_batch": job.micro_batch,
        "global_batch": job.global_batch,
        "seed": job.seed,
        "optimizer": told["optimizer"],
        "lora": told["lora"],
    }
