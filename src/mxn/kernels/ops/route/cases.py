"""Parity cases of `route`; the order of experts is free, so weights are compared by expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxn.kernels.params import RouterSpec
from mxn.kernels.parity import Case, Maker, Outputs

ROUTERS = {
    "mixtral": RouterSpec(num_experts=8, top_k=2, normalize=True),
    "qwen2-moe": RouterSpec(num_experts=60, top_k=4),
    "deepseek-v2": RouterSpec(
        num_experts=16, top_k=4, scale=16.0, num_groups=4, top_groups=2, group_score="max"
    ),
    "deepseek-v3": RouterSpec(
        num_experts=32, top_k=8, scoring="sigmoid", normalize=True, scale=2.5,
        num_groups=8, top_groups=4, group_score="top2_sum",
    ),
    "one expert": RouterSpec(num_experts=1, top_k=1),
}  # fmt: skip


def _build(make: Maker, tokens: int, router: RouterSpec) -> tuple[Any, ...]:
    logits = make.normal32(tokens, router.num_experts)
    bias = make.normal32(router.num_experts, scale=0.1) if router.scoring == "sigmoid" else None
    return logits, bias, router


def _by_expert(args: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> Outputs:
    weights, ids = result
    dense = torch.zeros_like(args[0]).scatter(1, ids, weights)
    return {"weights": dense, "ids": ids.sort(1).values}


CASES = tuple(
    Case(
        name=f"route {name} T{t}",
        build=lambda make, t=t, router=router: _build(make, t, router),
        outputs=_by_expert,
        dtypes=("float32",),
        is_typical=t == 16,
    )
    for name, router in ROUTERS.items()
    for t in (0, 1, 7, 16)
)
