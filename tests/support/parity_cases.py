"""A job cut up in many ways, and the same job on one device; see `support.ranks`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mxn.models.tokenizer import Tokenizer
from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.run.bridge import Bridge
from mxn.train.run.data import DataSettings, Rows, prepare
from mxn.train.run.lora import LoraSettings
from mxn.train.run.placement import Placement
from mxn.train.run.schedule import Schedule
from mxn.train.run.single import RunSettings, SingleTrainer
from mxn.train.run.trainer import RankTrainer
from mxn.train.run.weights import ModelSource

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "src/mxn/shipped/mxn-shakespeare-llama"
TEXT = ROOT / "recipes/data/tinyshakespeare.txt"
LAYERS = 6  # embedding, four blocks, head
SEQ_TOKENS, MICRO_BATCH = 24, 1
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16,
         "num_key_value_heads": 1, "num_hidden_layers": 4}  # fmt: skip
FOR_TEAMS = {"num_attention_heads": 4, "head_dim": 8, "num_key_value_heads": 2}


def plan_of(
    *pipelines: tuple[int, list[list[tuple[int, int]]]],
    schedule: str = "1f1b",
    recompute: str = "none",
    tps: list[int] | None = None,
) -> TrainPlan:
    """Return a plan from (micro-batches, stages); a stage is a list of (first, end) chunks.

    `tps`: tensor parallelism of all stages, in order; without it, none.
    """
    number = 0
    made = []
    wide = iter(tps or [])
    for micro_batches, stages in pipelines:
        cut = []
        for chunks in stages:
            tp = next(wide, 1)
            cut.append(
                Stage(
                    group="all",
                    first_device=number,
                    chunks=tuple(Chunk(first=first, end=end) for first, end in chunks),
                    recompute=recompute,  # type: ignore[arg-type]
                    tp=tp,
                )
            )
            number += tp
        made.append(Pipeline(stages=tuple(cut), micro_batches=micro_batches))
    return TrainPlan(
        model="shakespeare",
        num_layers=LAYERS,
        seq_tokens=SEQ_TOKENS,
        micro_batch=MICRO_BATCH,
        pipelines=tuple(made),
        schedule=schedule,  # type: ignore[arg-type]
    )


def small_model(*, is_for_teams: bool = False) -> Path:
    """Return a folder with the shipped tokenizer and a config small enough for quick tests.

    `is_for_teams`: with heads that two ranks can share out. The folder appears whole under its name
    and is never written again: other runs may be reading it.
    """
    told = json.loads((LLAMA / "config.json").read_text()) | SMALL
    config = json.dumps(told | (FOR_TEAMS if is_for_teams else {}))
    digest = hashlib.sha256(config.encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"mxn-parity-{os.getuid()}-{digest}"
    if folder.is_dir():
        return folder
    partial = Path(tempfile.mkdtemp())
    for file in LLAMA.iterdir():
        if file.suffix not in (".safetensors", ".md"):
            shutil.copy(file, partial)
    (partial / "config.json").write_text(config)
    try:
        partial.rename(folder)
    except OSError:  # another run was faster
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)
    return folder


def job(
    steps: int, micro_batches: int, model: str, **changes: Any
) -> tuple[ModelSource, Rows, RunSettings]:
    source = ModelSource.open(model, seq_tokens=SEQ_TOKENS, begin="scratch", seed=5)
    cache = prepare(DataSettings(paths=(TEXT,)), Tokenizer.load(LLAMA), source.spec.vocab_size)
    rows = Rows(cache, seq_tokens=SEQ_TOKENS, micro_batch=MICRO_BATCH, seed=1)
    if changes.get("lora"):
        changes["lora"] = LoraSettings(rank=4)
    schedule = Schedule(peak=3e-3, num_steps=steps, warmup_steps=3)
    return source, rows, RunSettings(schedule=schedule, micro_batches=micro_batches, **changes)


def single(
    steps: int, micro_batches: int, *, model: str | None = None, **changes: Any
) -> dict[str, Any]:
    """Return losses and norms of the job on one device."""
    trainer = SingleTrainer(*job(steps, micro_batches, model or str(small_model()), **changes))
    logs = trainer.run()
    return {"loss": [log.loss for log in logs], "norm": [log.gradient_norm for log in logs]}


def train(
    bridge: Bridge,
    plan: str,
    steps: int,
    model: str,
    dtypes: list[str] | None = None,
    slow_factors: list[float] | None = None,
    counts: dict[str, list[int]] | None = None,
    first_scale: float | None = None,
    open_share: float = 0.0,
    slow_rank: int | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Return what a rank saw: losses, norms, and a digest of each layer's weights at the end.

    `counts`: micro-batches by pipeline from a step on. `slow_rank`: its batches come late.
    """
    if slow_factors and bridge.device.type == "sim":
        from mxn.chips.sim import knobs

        knobs.set(slow_factor=slow_factors[bridge.rank])
    placement = Placement(TrainPlan.from_json(plan))
    trainer = RankTrainer(
        *job(steps, placement.plan.micro_batches, model, **changes),
        placement,
        bridge,
        dtypes=[getattr(torch, name) for name in dtypes or ["float32"] * placement.num_ranks],
        open_share=open_share,
    )
    if slow_rank == bridge.rank:
        _come_late(trainer.rows)
    if first_scale is not None:
        trainer.loss_scale.value = first_scale
    told = []
    for step in range(steps):
        trainer.set_counts(tuple((counts or {}).get(str(step), trainer.counts)))
        told.append(trainer.train_step())
    digests, masters = {}, {}
    for module, optimizer in zip(trainer.chunks, trainer.optimizers, strict=True):
        for layer in range(module.first, module.end):
            digests |= _digests(layer, module.whole_of(layer, module.layer_state(layer)))
            own = optimizer.layer_state(layer)
            masters |= _digests(
                layer,
                {n.removesuffix(".master"): own[n] for n in own if n.endswith(".master")},
            )
    return {
        "loss": [step.log.loss for step in told],
        "norm": [step.log.gradient_norm for step in told],
        "done": [step.done for step in told],
        "taken": [step.log.is_taken for step in told],
        "digests": digests,
        "masters": masters,
        "waited_s": sum(step.times[bridge.rank].waited_s for step in told),
        "busy_s": sum(step.times[bridge.rank].busy_s for step in told),
        "slots": sum(
            len(optimizer.layer_state(layer))
            for module, optimizer in zip(trainer.chunks, trainer.optimizers, strict=True)
            for layer in range(module.first, module.end)
        ),
        "sent_bytes": {str(peer): count.sent_bytes for peer, count in bridge.counts.items()},
    }


def _digests(layer: int, state: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        f"{layer} {name}": hashlib.sha256(tensor.float().cpu().numpy().tobytes()).hexdigest()[:12]
        for name, tensor in sorted(state.items())
    }


def _come_late(rows: Rows) -> None:
    given = rows.micro_batch

    def late(number: int) -> Any:
        time.sleep(0.05)  # many times what the small model takes
        return given(number)

    rows.micro_batch = late  # type: ignore[method-assign]


def train_apart(bridge: Bridge, plan: str, model: str) -> None:
    """Do a step in which each rank has other counts in mind."""
    placement = Placement(TrainPlan.from_json(plan))
    micro_batches = placement.plan.micro_batches
    trainer = RankTrainer(
        *job(4, micro_batches, model), placement, bridge, dtypes=[torch.float32] * 2
    )
    trainer.set_counts((micro_batches - 1 - bridge.rank, 1 + bridge.rank))
    trainer.train_step()
