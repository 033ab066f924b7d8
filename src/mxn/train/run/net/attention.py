"""Attention that can be trained: grouped queries, or queries and keys from latents (MLA).

Knows one layer; masks and angles come with the `Context`. In a team (tensor parallelism) each rank
has its part of the heads. Start at `make_attention`.
Shape letters: R rows, T tokens, D hidden, N heads, G key/value heads, H head dim, L latent rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mxn.models.names import Names
from mxn.models.spec import AttentionSpec
from mxn.train.run.net.context import Context
from mxn.train.run.net.parts import RmsNorm, Tree
from mxn.train.run.net.shard import Team, enter, share_of


class Attention:
    """x [R, T, D] -> y [R, T, D]. The weights hang in the tree of the block, not here."""

    def __init__(self, spec: AttentionSpec, team: Team | None) -> None:
        """`spec`: of the heads that this rank has."""
        self.spec, self.team = spec, team
        self.recomputes = False

    def __call__(self, x: Tensor, context: Context) -> Tensor:
        raise NotImplementedError

    def mix(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Return softmax(q kᵀ) v with heads joined: q [R, T, N, H], k and v [R, T, G, ·]."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        spec = self.spec
        mask = None if context.is_plain_causal(spec.window) else context.mask(spec.window)
        if self.recomputes and torch.is_grad_enabled():
            out = checkpoint(_attend, q, k, v, mask, spec, context, use_reentrant=False)
        else:
            out = _attend(q, k, v, mask, spec, context)
        return out.transpose(1, 2).flatten(-2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec, context: Context
) -> Tensor:
    """Shapes: q [R, N, T, H], k [R, G, T, H], v [R, G, T, J]; result [R, N, T, J]."""
    shares = q.shape[1] // k.shape[1]
    if shares > 1 and not _fused_kernel_shares_heads(q, mask, spec):
        k, v = (t.repeat_interleave(shares, dim=1) for t in (k, v))
    if spec.softcap is None:
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=spec.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )  # fmt: skip
    scores = torch.matmul(q, k.transpose(-1, -2)) * spec.scale
    scores = torch.tanh(scores / spec.softcap) * spec.softcap
    if mask is None:
        mask = context.mask(spec.window)
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(q.dtype), v)


def _fused_kernel_shares_heads(q: Tensor, mask: Tensor | None, spec: AttentionSpec) -> bool:
    """Whether torch has a kernel here that lets heads share keys and keeps no T × T matrix.

    On GPUs that is flash attention, which takes neither masks nor float32; the next best kernel
    wants as many keys as queries.
    """
    if spec.softcap is not None:
        return False
    return q.device.type == "cpu" or (mask is None and q.dtype != torch.float32)


class GroupedAttention(Attention):
    """Queries of N heads over keys and values of G heads."""

    def __init__(self, spec: AttentionSpec, names: Names, tree: Tree) -> None:
        super().__init__(spec, tree.make.team)
        dim, hidden = spec.head_dim, tree.model.hidden
        widths = (spec.num_heads * dim, spec.num_kv_heads * dim, spec.num_kv_heads * dim)
        self.is_grouped = names.qkv_layout == "grouped"
        if len(names.qkv) == 1:
            # Groups stand one behind the other, so they are cut as one section.
            sections = (sum(widths),) if self.is_grouped else widths
            self.qkv = [tree.linear_in(names.qkv[0], hidden, *sections)]
        else:
            self.qkv = [
                tree.linear_in(path, hidden, width)
                for path, width in zip(names.qkv, widths, strict=True)
            ]
        self.out = tree.linear_out(names.attn_out, spec.num_heads * dim, hidden)
        self.norms: list[RmsNorm] = []
        if spec.qk_norm != "none":
            is_full = spec.qk_norm == "full"
            factors = (spec.num_heads, spec.num_kv_heads) if is_full else (1, 1)
            self.norms = [
                tree.norm_of_heads(path, factor * dim, is_cut=is_full)
                for path, factor in zip((names.q_norm, names.k_norm), factors, strict=True)
            ]

    def __call__(self, x: Tensor, context: Context) -> Tensor:
        spec = self.spec
        q, k, v = self._project(enter(x, self.team))
        if spec.qk_norm == "full":
            q, k = self.norms[0](q), self.norms[1](k)
        q, k, v = (t.unflatten(-1, (-1, spec.head_dim)) for t in (q, k, v))
        if spec.qk_norm == "head":
            q, k = self.norms[0](q), self.norms[1](k)
        if spec.rope:
            cos, sin = context.angles(spec.rope)
            q = rotate(q, cos, sin, spec.rope.is_interleaved)
            k = rotate(k, cos, sin, spec.rope.is_interleaved)
        return self.out(self.mix(q, k, v, context))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [R, T, N·H], keys and values [R, T, G·H]."""
        spec, dim = self.spec, self.spec.head_dim
        if len(self.qkv) == 3:
            return self.qkv[0](x), self.qkv[1](x), self.qkv[2](x)
        joined = self.qkv[0](x)
        if not self.is_grouped:
            width = spec.num_kv_heads * dim
            q, k, v = joined.split((spec.num_heads * dim, width, width), dim=-1)
            return q, k, v
        each = spec.num_heads // spec.num_kv_heads + 2
        grouped = joined.unflatten(-1, (spec.num_kv_heads, each, dim))
        parts = grouped[..., :-2, :], grouped[..., -2, :], grouped[..., -1, :]
        q, k, v = (part.flatten(2) for part in parts)
        return q, k, v


class LatentAttention(Attention):
    """Multi-head latent attention, with keys and values unfolded for each head.

    The engine runs the absorbed form over a cache of latents; in training nothing is cached, and
    this one needs fewer products. Source: arXiv 2405.04434, section 2.1.
    """

    def __init__(self, spec: AttentionSpec, names: Names, tree: Tree) -> None:
        super().__init__(spec, tree.make.team)
        mla, heads, hidden = spec.mla, spec.num_heads, tree.model.hidden
        assert mla is not None
        self.mla = mla
        queries = heads * (mla.nope_dim + mla.rope_dim)
        if mla.q_lora_rank is None:
            self.query: list[nn.Module] = [tree.linear_in(names.mla_q, hidden, queries)]
        else:
            rank = mla.q_lora_rank
            self.query = [
                tree.linear(names.mla_q_a, hidden, rank),
                tree.norm(names.mla_q_a_norm, rank, mla.norm_eps),
                tree.linear_in(names.mla_q_b, rank, queries),
            ]
        latent = mla.kv_lora_rank
        self.kv_a = tree.linear(names.mla_kv_a, hidden, latent + mla.rope_dim)
        self.kv_norm = tree.norm(names.mla_kv_a_norm, latent, mla.norm_eps)
        self.kv_b = tree.linear_in(names.mla_kv_b, latent, heads * (mla.nope_dim + mla.v_dim))
        self.out = tree.linear_out(names.attn_out, heads * mla.v_dim, hidden)

    def __call__(self, x: Tensor, context: Context) -> Tensor:
        spec, mla = self.spec, self.mla
        assert spec.rope is not None
        q = x
        for step in self.query[:-1]:
            q = step(q)
        q = self.query[-1](enter(q, self.team))
        q_nope, q_rope = q.unflatten(-1, (spec.num_heads, -1)).split(
            (mla.nope_dim, mla.rope_dim), dim=-1
        )
        latent, k_rope = self.kv_a(x).split((mla.kv_lora_rank, mla.rope_dim), dim=-1)
        latent, k_rope = enter(self.kv_norm(latent), self.team), enter(k_rope, self.team)
        k_nope, v = (
            self.kv_b(latent)
            .unflatten(-1, (spec.num_heads, -1))
            .split((mla.nope_dim, mla.v_dim), dim=-1)
        )
        cos, sin = context.angles(spec.rope)
        q_rope = rotate(q_rope, cos, sin, spec.rope.is_interleaved)
        k_rope = rotate(k_rope.unsqueeze(2), cos, sin, spec.rope.is_interleaved)
        query = torch.cat((q_nope, q_rope), dim=-1)
        key = torch.cat((k_nope, k_rope.expand(-1, -1, spec.num_heads, -1)), dim=-1)
        return self.out(self.mix(query, key, v, context))


def make_attention(spec: AttentionSpec, names: Names, tree: Tree) -> Attention:
    """Raises: UnsupportedError for heads that the team cannot share out evenly."""
    team = tree.make.team
    kv_heads = spec.num_kv_heads
    if spec.mla is None:
        kv_heads = share_of(kv_heads, team, "key/value heads")
    mine = replace(
        spec, num_heads=share_of(spec.num_heads, team, "attention heads"), num_kv_heads=kv_heads
    )
    return (LatentAttention if spec.mla else GroupedAttention)(mine, names, tree)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool) -> Tensor:
    """Turn the first 2P dims of each head by its position's angles, in float32.

    Shapes: x [R, T, N, H], cos and sin [R, T, 1, P]. Source: Su et al. 2021, eq. 34.
    """
    half = cos.shape[-1]
    wide = x[..., : 2 * half].float()
    if is_interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = wide[..., :half], wide[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    turned = turned.to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), dim=-1)
