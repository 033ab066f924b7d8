"""What the training tests share: a trained stage beside its reference, gradients by stored name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mxn.models.spec import MoeSpec
from mxn.train.run.data import MicroBatch
from mxn.train.run.net import StageModule
from mxn.train.run.weights import ModelSource
from support import tiny

SHIPPED = Path(__file__).parents[2] / "src/mxn/shipped"
LLAMA = SHIPPED / "mxn-shakespeare-llama"
SHAKESPEARE = Path(__file__).parents[2] / "recipes/data/tinyshakespeare.txt"


def random_ids(rows: int, length: int, *, seed: int = 3, vocab: int = tiny.VOCAB) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (rows, length), generator=generator)


def random_batch(rows: int = 2, length: int = 29, *, seed: int = 3) -> MicroBatch:
    return MicroBatch.of_rows(random_ids(rows, length, seed=seed))


def gradients(stages: Iterable[StageModule]) -> dict[str, Tensor]:
    """Return the gradient of each parameter; of a tied matrix the sum of its copies."""
    found: dict[str, Tensor] = {}
    for stage in stages:
        for layer in range(stage.first, stage.end):
            for name, parameter in stage.layer_parameters(layer).items():
                if parameter.grad is not None:
                    found[name] = parameter.grad
    stage = next(iter(stages))
    if stage.spec.is_tied and stage.tied_copy is not None:
        head = found.pop(f"{stage.names.head}.weight")
        found[f"{stage.names.embedding}.weight"] += head
    elif stage.spec.is_tied:
        found.pop(f"{stage.names.head}.weight")
    return found


def reference_gradients(model: torch.nn.Module, source: ModelSource) -> dict[str, Tensor]:
    """Return what transformers computes, under the names of the checkpoint."""
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = source.family.names
    for index, layer in enumerate(source.spec.layers):
        if not isinstance(layer.ffn, MoeSpec):
            continue
        prefix = names.layer.format(i=index)
        # transformers keeps the experts of a layer in two tensors.
        gate_up = own.pop(f"model.layers.{index}.mlp.experts.gate_up_proj")
        down = own.pop(f"model.layers.{index}.mlp.experts.down_proj")
        own[f"{prefix}{names.router}.weight"] = own.pop(f"model.layers.{index}.mlp.gate.weight")
        for e in range(len(down)):
            gate, up = (prefix + part.format(e=e) for part in names.expert_gate_up)
            own[f"{gate}.weight"], own[f"{up}.weight"] = gate_up[e].chunk(2)
            own[f"{prefix}{names.expert_down.format(e=e)}.weight"] = down[e]
    return own


def whole_stage(source: ModelSource, **options: object) -> StageModule:
    return source.stage(0, source.num_layers, **options)  # type: ignore[arg-type]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm().clamp_min(1e-12)).item()
