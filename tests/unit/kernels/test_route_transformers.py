"""`route` against the routers of transformers, with their own configs."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from mxn.kernels.params import RouterSpec
from mxn.kernels.registry import kernels_of

HIDDEN = 64
CASES = {
    "mixtral": (
        MixtralTopKRouter(MixtralConfig(hidden_size=HIDDEN, num_local_experts=8)),
        RouterSpec(num_experts=8, top_k=2, normalize=True),
    ),
    "qwen3_moe": (
        Qwen3MoeTopKRouter(
            Qwen3MoeConfig(hidden_size=HIDDEN, num_experts=32, norm_topk_prob=True)
        ),
        RouterSpec(num_experts=32, top_k=8, normalize=True),
    ),
    "deepseek_v2 group_limited_greedy": (
        DeepseekV2TopkRouter(
            DeepseekV2Config(
                hidden_size=HIDDEN, n_routed_experts=32, num_experts_per_tok=6, n_group=8,
                topk_group=3, topk_method="group_limited_greedy", routed_scaling_factor=16.0,
            )
        ),
        RouterSpec(num_experts=32, top_k=6, scale=16.0, num_groups=8, top_groups=3),
    ),
    "deepseek_v2 greedy": (
        DeepseekV2TopkRouter(
            DeepseekV2Config(
                hidden_size=HIDDEN, n_routed_experts=32, num_experts_per_tok=6,
                topk_method="greedy", routed_scaling_factor=1.0,
            )
        ),
        RouterSpec(num_experts=32, top_k=6),
    ),
    "deepseek_v3 noaux_tc": (
        DeepseekV3TopkRouter(
            DeepseekV3Config(
                hidden_size=HIDDEN, n_routed_experts=64, num_experts_per_tok=8, n_group=8,
                topk_group=4, norm_topk_prob=True, routed_scaling_factor=2.5,
            )
        ),
        RouterSpec(
            num_experts=64, top_k=8, scoring="sigmoid", normalize=True, scale=2.5, num_groups=8,
            top_groups=4, group_score="top2_sum",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_route_picks_what_transformers_picks(name: str) -> None:
    router, spec = CASES[name]
    seeded = torch.Generator().manual_seed(3)
    router.weight.copy_(torch.randn(router.weight.shape, generator=seeded))
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is not None:
        bias.copy_(torch.randn(bias.shape, generator=seeded) * 0.2)
    x = torch.randn(50, HIDDEN, generator=seeded)
    logits, want_weights, want_ids = router(x)
    weights, ids = kernels_of("route")["torch"].fn(x @ router.weight.T, bias, spec)
    dense = torch.zeros_like(logits, dtype=torch.float32)
    got, want = dense.scatter(1, ids, weights), dense.scatter(1, want_ids, want_weights.float())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
