"""LoRA adapters on the matrices of a stage: added, frozen around, merged, and named as PEFT does.

Knows one stage; files are `export.py`'s business. Source: arXiv 2106.09685, section 4.1. Start at
`attach`. Shape letters: D inputs and F outputs of a matrix, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mxn.errors import ConfigError, UnsupportedError
from mxn.train.run.net import StageModule
from mxn.train.run.net.parts import Linear, Make
from mxn.train.run.weights import generator_for

ALL_LINEAR = ("all-linear",)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """`targets`: ends of module names, such as ``q_proj``; or all matrices that tokens pass.

    Matrices of single experts and of routers are not among them: neither PEFT nor the engine
    adapts those. Neither is the output projection, unless it is named.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ALL_LINEAR

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ConfigError(
                f"a LoRA rank must be at least 1 and alpha above 0, got {self.rank!r}"
                f" and {self.alpha!r}"
            )
        if not self.targets:
            raise ConfigError("LoRA needs at least one target", hint="targets: all-linear")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def attach(stage: StageModule, settings: LoraSettings, *, seed: int) -> list[str]:
    """Freeze a stage and add adapters that do nothing yet; return the modules that got one.

    Values depend on the seed and the module's name, so any plan begins alike.
    Raises: UnsupportedError for a target that takes no adapter.
    """
    for parameter in stage.parameters():
        parameter.requires_grad_(False)
    found = []
    for linear in list(_linears(stage)):
        if not _is_target(linear.name, settings.targets, stage):
            continue
        make = Make(dtype=stage.dtype, device=stage.device)
        linear.lora_A = Linear(make, f"{linear.name}.lora_A", linear.in_features, settings.rank)
        linear.lora_B = Linear(make, f"{linear.name}.lora_B", settings.rank, linear.out_features)
        linear.lora_scale = settings.scale
        _cut_as(linear, linear.lora_A, linear.lora_B)
        _draw(linear.lora_A, linear.lora_B, seed)
        found.append(linear.name)
    return found


def targeted(stage: StageModule, settings: LoraSettings) -> list[str]:
    """Return the modules of a stage that `attach` would give an adapter. Raises: as `attach`."""
    names = [linear.name for linear in _linears(stage)]
    return [name for name in names if _is_target(name, settings.targets, stage)]


def check_targets(settings: LoraSettings, modules: list[str]) -> None:
    """Raise UnsupportedError for a target that none of the adapted modules of the model answers."""
    if settings.targets == ALL_LINEAR:
        return
    for target in settings.targets:
        if not any(_ends(module, target) for module in modules):
            kinds = sorted({module.rsplit(".", 1)[-1] for module in modules})
            raise UnsupportedError(
                f"LoRA target {target!r} is no matrix of this model"
                + (f"; adapted were {', '.join(kinds)}" if kinds else ""),
                hint="targets: all-linear",
            )


def merged(state: Mapping[str, Tensor], settings: LoraSettings) -> dict[str, Tensor]:
    """Return a layer's state with the adapters added to their matrices: W + scale · B A."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        module = name.removesuffix(".weight")
        a_rD, b_Fr = (state.get(f"{module}.lora_{side}.weight") for side in "AB")
        if a_rD is not None and b_Fr is not None:
            product = b_Fr.float() @ a_rD.float()
            tensor = (tensor.float() + settings.scale * product).to(tensor.dtype)
        out[name] = tensor
    return out


def _linears(stage: StageModule) -> Iterator[Linear]:
    return (module for module in stage.modules() if isinstance(module, Linear))


def _is_target(name: str, targets: tuple[str, ...], stage: StageModule) -> bool:
    if targets == ALL_LINEAR:
        return _is_passed_by_all(name, stage)
    if not any(_ends(name, target) for target in targets):
        return False
    if ".experts." in name:
        return False  # `gate_proj` is also the name of what a shared expert has
    if not _is_passed_by_all(name, stage) and not _is_head(name, stage):
        raise UnsupportedError(
            f"{name!r} chooses among experts; adapters go to what tokens pass through afterwards",
            hint="leave it out of the targets",
        )
    if _is_head(name, stage) and stage.spec.is_tied:
        raise UnsupportedError(
            f"{name!r} is tied to the embedding: an adapter would untie them",
            hint="leave it out of the targets",
        )
    return True


def _is_passed_by_all(name: str, stage: StageModule) -> bool:
    routers = (stage.names.router, stage.names.shared_gate)
    is_router = any(_ends(name, router) for router in routers)
    return ".experts." not in name and not is_router and not _is_head(name, stage)


def _is_head(name: str, stage: StageModule) -> bool:
    return name == stage.names.head


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _cut_as(linear: Linear, a_rD: Linear, b_Fr: Linear) -> None:
    """Say how the adapter of a matrix that is cut over a team is cut with it."""
    cut = linear.cuts.get("weight")
    if cut is not None:
        part = b_Fr if cut.dim == 0 else a_rD
        part.team, part.cuts = linear.team, {"weight": cut}


@torch.no_grad()
def _draw(a_rD: Linear, b_Fr: Linear, seed: int) -> None:
    """A as PEFT begins it (Kaiming uniform with a = √5: bound 1/√D), B zero."""
    shape, cut, team = a_rD.weight.shape, a_rD.cuts.get("weight"), a_rD.team
    if cut is not None and team is not None:
        shape = cut.whole_shape(shape, team.size)
    bound = 1 / math.sqrt(shape[1])
    values = torch.empty(shape).uniform_(
        -bound, bound, generator=generator_for(f"{a_rD.name}.weight", seed)
    )
    if cut is not None and team is not None:
        values = cut.part(values, team.index, team.size)
    a_rD.weight.copy_(values)
    b_Fr.weight.zero_()
