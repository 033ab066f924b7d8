"""Copies of layers that were pushed apart, and made equal again; see `support.ranks`."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from mxn.errors import UserError
from mxn.train.plan.plan import TrainPlan
from mxn.train.run.bridge import Bridge
from mxn.train.run.placement import Placement
from mxn.train.run.trainer import RankTrainer
from support.parity_cases import job


def align(
    bridge: Bridge,
    plan: str,
    model: str,
    dtypes: list[str],
    push: float = 0.0,
) -> dict[str, Any]:
    """Return digests of weights and moments at the start, behind a step and behind `align`.

    `push`: what the last rank's weights are multiplied with behind the step, less 1.
    """
    placement = Placement(TrainPlan.from_json(plan))
    trainer = RankTrainer(
        *job(5, placement.plan.micro_batches, model), placement, bridge,
        dtypes=[getattr(torch, name) for name in dtypes],
    )  # fmt: skip
    begin = trainer.align(judge=False)
    told = {"begin": begin, "at start": digests(trainer)}
    trainer.train_step()
    if bridge.rank == bridge.size - 1:
        seen: set[int] = set()  # embedding and head of one stage share a matrix
        for module, optimizer in zip(trainer.chunks, trainer.optimizers, strict=True):
            for layer in range(module.first, module.end):
                for name, tensor in optimizer.layer_state(layer).items():
                    if tensor.data_ptr() not in seen:
                        tensor.mul_(1 + push if name.endswith("master") else 1 + 1e-6)
                    seen.add(tensor.data_ptr())
    told["pushed"] = digests(trainer)
    try:
        told["apart"] = trainer.align()
    except UserError as error:
        told["error"] = str(error)
    told["aligned"] = digests(trainer)
    trainer.train_step()
    return told


def digests(trainer: RankTrainer) -> dict[str, str]:
    found = {}
    for module, optimizer in zip(trainer.chunks, trainer.optimizers, strict=True):
        for layer in range(module.first, module.end):
            for name, tensor in sorted(optimizer.whole_layer_state(layer).items()):
                found[f"{layer} {name}"] = digest(tensor)
    return found


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.float().cpu().numpy().tobytes()).hexdigest()[:12]
