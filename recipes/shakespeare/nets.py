"""The two networks as they are trained; parameter names are those of Hugging Face checkpoints.

They exist beside the classes of `transformers` for two reasons: dropout on the residual stream,
which decides how well a model of a megabyte of text generalizes, and experts that are fast on a
CPU. The export is compared with `transformers` (export.py), so a difference between the two is
found.

Shape letters: B rows, T tokens of a row, D hidden, N heads, G key/value heads, H head dim, E
experts, K chosen experts, S = B * T.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotary_table(dim: int, theta: float, num_positions: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin [num_positions, dim / 2] in float32."""
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x_BNTH: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool) -> Tensor:
    """Rotate pairs of dims by position; a pair is (i, i + H/2), or (2i, 2i + 1) if interleaved."""
    cos, sin = cos[: x_BNTH.shape[2]].to(x_BNTH.dtype), sin[: x_BNTH.shape[2]].to(x_BNTH.dtype)
    if is_interleaved:
        a, b = x_BNTH[..., 0::2], x_BNTH[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    a, b = x_BNTH.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Norm(nn.RMSNorm):
    """Root-mean-square norm in float32, also where autocast gives bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = linear(hidden, width)
        self.up_proj = linear(hidden, width)
        self.down_proj = linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GroupedAttention(nn.Module):
    """Llama's attention."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = linear(config.hidden_size, self.heads * self.head_dim)
        self.k_proj = linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = linear(self.heads * self.head_dim, config.hidden_size)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        rows, tokens, _ = x_BTD.shape
        q, k, v = (
            proj(x_BTD).view(rows, tokens, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotate(part, *rope, is_interleaved=False) for part in (q, k))
        repeat = self.heads // self.kv_heads
        k, v = (part.repeat_interleave(repeat, dim=1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(rows, tokens, -1))


class LatentAttention(nn.Module):
    """DeepSeek's MLA, written out (the latent is expanded; a server caches the latent instead)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.v_dim, self.rank = config.v_head_dim, config.kv_lora_rank
        eps = config.rms_norm_eps
        self.q_a_proj = linear(config.hidden_size, config.q_lora_rank)
        self.q_a_layernorm = Norm(config.q_lora_rank, eps)
        self.q_b_proj = linear(config.q_lora_rank, self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = linear(config.hidden_size, self.rank + self.rope)
        self.kv_a_layernorm = Norm(self.rank, eps)
        self.kv_b_proj = linear(self.rank, self.heads * (self.nope + self.v_dim))
        self.o_proj = linear(self.heads * self.v_dim, config.hidden_size)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        rows, tokens, _ = x_BTD.shape
        shape = (rows, tokens, self.heads, -1)
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD))).view(shape).transpose(1, 2)
        latent, k_rope = self.kv_a_proj_with_mqa(x_BTD).split((self.rank, self.rope), dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(shape).transpose(1, 2)
        k_nope, v = kv.split((self.nope, self.v_dim), dim=-1)
        q_nope, q_rope = q.split((self.nope, self.rope), dim=-1)
        q_rope = rotate(q_rope, *rope, is_interleaved=True)
        k_rope = rotate(k_rope[:, None], *rope, is_interleaved=True).expand(-1, self.heads, -1, -1)
        q, k = torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(rows, tokens, -1))


class Router(nn.Module):
    """Sigmoid scores; groups and experts chosen with a balance bias that the weights do not see.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2 ("noaux_tc").
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k, self.groups = config.num_experts_per_tok, config.n_group
        self.top_groups, self.scale = config.topk_group, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.load_E = torch.zeros(config.n_routed_experts)  # tokens per expert since last balance

    def forward(self, x_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and expert indices, both [S, K]."""
        with torch.autocast("cpu", enabled=False):
            scores = F.linear(x_SD.float(), self.weight).sigmoid()
        with torch.no_grad():
            biased = scores + self.e_score_correction_bias
            grouped = biased.view(len(biased), self.groups, -1)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
            is_open = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, True)
            allowed = grouped.masked_fill(~is_open[..., None], float("-inf")).flatten(1)
            chosen = allowed.topk(self.top_k, dim=-1).indices
            if self.training:
                self.load_E += torch.bincount(chosen.flatten(), minlength=len(self.load_E))
        weights = scores.gather(1, chosen)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale, chosen

    @torch.no_grad()
    def balance(self, rate: float) -> float:
        """Move the bias toward the idle experts; return the largest load over the mean load."""
        mean = self.load_E.mean()
        violation = float(self.load_E.max() / mean)
        self.e_score_correction_bias += rate * torch.sign(mean - self.load_E)
        self.load_E.zero_()
        return violation


class Moe(nn.Module):
    """Routed experts and one shared expert."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.moe_intermediate_size
        self.gate = Router(config)
        self.experts = nn.ModuleList(
            Mlp(config.hidden_size, width) for _ in range(config.n_routed_experts)
        )
        self.shared_experts = Mlp(config.hidden_size, width * config.n_shared_experts)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_SD = x_BTD.flatten(0, 1)
        weights, chosen = self.gate(x_SD)
        order = chosen.flatten().argsort(stable=True)
        token = order // chosen.shape[1]
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        pieces = x_SD[token].split(counts)
        routed = torch.cat([expert(x) for expert, x in zip(self.experts, pieces, strict=True)])
        routed = routed * weights.flatten()[order, None].to(routed.dtype)
        out = self.shared_experts(x_SD).index_add(0, token, routed)
        return out.view_as(x_BTD)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, with dropout on what each adds."""

    def __init__(self, config: Any, index: int, dropout: float) -> None:
        super().__init__()
        is_deepseek = config.model_type == "deepseek_v3"
        is_moe = is_deepseek and index >= config.first_k_dense_replace
        self.self_attn = LatentAttention(config) if is_deepseek else GroupedAttention(config)
        dense = (config.hidden_size, config.intermediate_size)
        self.mlp = Moe(config) if is_moe else Mlp(*dense)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.self_attn(self.input_layernorm(x_BTD), rope))
        return x_BTD + self.dropout(self.mlp(self.post_attention_layernorm(x_BTD)))


class Body(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: Any, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, i, dropout) for i in range(config.num_hidden_layers)
        )
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)


class Network(nn.Module):
    """A causal language model of either shape."""

    def __init__(self, config: Any, dropout: float) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config, dropout)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self._initialize()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        is_deepseek = config.model_type == "deepseek_v3"
        dim = config.qk_rope_head_dim if is_deepseek else config.head_dim
        theta = config.rope_parameters["rope_theta"]
        self._rope = rotary_table(dim, theta, config.max_position_embeddings)

    def _initialize(self) -> None:
        # What writes to the residual stream starts smaller, so depth does not change its scale.
        residual_scale = (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                scale = (
                    residual_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                )
                fan_in = parameter.shape[1]
                std = 0.02 if "embed_tokens" in name else 0.5 * fan_in**-0.5
                nn.init.normal_(parameter, std=std * scale)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return logits [B, T, V]."""
        x_BTD = self.model.dropout(self.model.embed_tokens(ids_BT))
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, self._rope)
        return self.lm_head(self.model.norm(x_BTD))

    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]
