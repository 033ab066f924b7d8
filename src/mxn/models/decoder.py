"""Runs any decoder that a `DecoderSpec` describes, on flattened tokens over a paged cache.

Knows specs, weights and ops; knows nothing of requests, schedules or chips. Start at
`Decoder.forward`.
Shape letters: see `mxn.kernels.batch`; L latent rank, P position-free part of a query head (MLA).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mxn.models.base import LayerCache
from mxn.models.spec import AttentionSpec, DecoderSpec, MlpSpec, MoeSpec, RopeSpec
from mxn.models.weights import (
    GqaWeights,
    LayerWeights,
    MlaWeights,
    MlpWeights,
    MoeWeights,
    MtpWeights,
    WeightReader,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.kernels.batch import AttentionBatch, StepBatch
    from mxn.kernels.registry import Ops
    from mxn.models.checkpoint import Checkpoint
    from mxn.models.names import Names
    from mxn.models.spec import LayerSpec

Angles = dict[RopeSpec, tuple["Tensor", "Tensor"]]


class RopeTable:
    """cos and sin of all positions for one `RopeSpec`, grown on demand by doubling."""

    def __init__(self, spec: RopeSpec, device: torch.device, max_positions: int) -> None:
        self._spec = spec
        self._device = device
        self._limit = max_positions
        self._cos = self._sin = torch.empty(0, device=device)
        self._grow(min(max_positions, 4096))

    def _grow(self, length: int) -> None:
        inv_freq = torch.tensor(self._spec.inv_freq, dtype=torch.float32)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), inv_freq)
        self._cos = (angles.cos() * self._spec.scale).to(self._device)
        self._sin = (angles.sin() * self._spec.scale).to(self._device)

    def at(self, positions_T: Tensor, highest: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin [T, R], float32. `highest` is the largest position, on the host."""
        if highest >= len(self._cos):
            self._grow(min(self._limit, max(2 * len(self._cos), highest + 1)))
        return self._cos[positions_T], self._sin[positions_T]


class Residual:
    """The residual stream `x`, with the last branch's output still to be added.

    Deferring the addition lets it fuse with the norm that follows.
    """

    __slots__ = ("_branch", "_eps", "_ops", "_scale", "_x")

    def __init__(self, x_TD: Tensor, ops: Ops, eps: float) -> None:
        self._x, self._ops, self._eps = x_TD, ops, eps
        self._branch: Tensor | None = None
        self._scale = 1.0

    def add(self, branch_TD: Tensor, post_norm: Tensor | None, scale: float) -> None:
        if post_norm is not None:
            branch_TD = self._ops.rms_norm(branch_TD, post_norm, self._eps)
        self._branch, self._scale = branch_TD, scale

    def normed(self, weight_D: Tensor | None) -> Tensor:
        """Return the stream, normed with `weight_D` unless that is None."""
        if self._branch is not None and weight_D is not None and self._scale == 1.0:
            normed, self._x = self._ops.add_rms_norm(self._branch, self._x, weight_D, self._eps)
            self._branch = None
            return normed
        x = self.value()
        return x if weight_D is None else self._ops.rms_norm(x, weight_D, self._eps)

    def value(self) -> Tensor:
        if self._branch is not None:
            self._x = torch.add(self._x, self._branch, alpha=self._scale)
            self._branch = None
        return self._x


class Decoder:
    """A decoder-only model, native to mxn. Implements `CausalLM`."""

    def __init__(
        self,
        spec: DecoderSpec,
        ops: Ops,
        *,
        embedding_VD: Tensor,
        layers: list[LayerWeights],
        final_norm: Tensor,
        head: object,
        mtp: list[MtpWeights],
        names: Names | None = None,
    ) -> None:
        """`names` says which module of the checkpoint each weight was; adapters need it."""
        self.spec = spec
        self.names = names
        self.ops = ops
        self.vocab_size = spec.vocab_size
        self.max_positions = spec.max_positions
        self.kv_shapes = tuple(layer.attention.kv_shape for layer in spec.layers)
        self.dtype = ops.dtype
        self.device = ops.device
        self.mtp = mtp
        self._embedding_VD = embedding_VD
        self.layers = layers
        self._final_norm = final_norm
        self.head = head
        ropes = {layer.attention.rope for layer in spec.layers} - {None}
        self._ropes = {r: RopeTable(r, ops.device, spec.max_positions) for r in ropes if r}

    @classmethod
    def load(cls, spec: DecoderSpec, names: Names, checkpoint: Checkpoint, ops: Ops) -> Decoder:
        """Read all weights of `spec` from `checkpoint` onto the device of `ops`."""
        reader = WeightReader(spec, names, checkpoint, ops)
        embedding = reader.embedding()
        head = reader.head(embedding)
        return cls(
            spec,
            ops,
            embedding_VD=embedding,
            layers=[reader.layer(i) for i in range(len(spec.layers))],
            final_norm=reader.norm(names.final_norm),
            head=head,
            mtp=reader.mtp(head),
            names=names,
        )

    def forward(self, batch: StepBatch, cache: list[LayerCache]) -> Tensor:
        """Write the step's keys and values into `cache` and return logits [R, V], float32."""
        hidden_TD = self.hidden(batch, cache)
        if batch.logits_rows_R is not None:
            hidden_TD = hidden_TD[batch.logits_rows_R]
        return self.logits(self.final_normed(hidden_TD))

    def forward_hidden(self, batch: StepBatch, cache: list[LayerCache]) -> tuple[Tensor, Tensor]:
        """Return what `forward` does, and the rows behind the final norm [T, D]."""
        normed_TD = self.final_normed(self.hidden(batch, cache))
        rows_R = batch.logits_rows_R
        return self.logits(normed_TD if rows_R is None else normed_TD[rows_R]), normed_TD

    def logits(self, normed_RD: Tensor) -> Tensor:
        """Return the logits [R, V], float32, of rows that are behind the final norm."""
        return self._logits(normed_RD, self.head)

    def hidden(self, batch: StepBatch, cache: list[LayerCache]) -> Tensor:
        """Return the residual stream behind the last layer, before the final norm: [T, D]."""
        x_TD = self._embed(batch.token_ids_T)
        angles = self._angles(batch)
        stream = Residual(x_TD, self.ops, self.spec.norm_eps)
        for spec, weights, layer_cache in zip(self.spec.layers, self.layers, cache, strict=True):
            self._layer(stream, spec, weights, angles, batch.attention, layer_cache)
        return stream.value()

    def predict_after_next(
        self, normed_TD: Tensor, batch: StepBatch, cache: LayerCache, depth: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Run a multi-token-prediction layer: logits of the token after the next one.

        `normed_TD` is the model's output behind its final norm at positions t (`final_normed`);
        `batch` holds the tokens at t + 1, at positions t; `cache` is the layer's own. Returns
        logits [R, V] of the rows that `batch` wants, and the layer's output [T, D]. Source: arXiv
        2412.19437, section 2.2.
        """
        weights, eps = self.mtp[depth], self.spec.norm_eps
        token_TD = self.ops.rms_norm(self._embed(batch.token_ids_T), weights.token_norm, eps)
        merged = torch.cat((token_TD, self.ops.rms_norm(normed_TD, weights.hidden_norm, eps)), -1)
        stream = Residual(weights.merge(merged), self.ops, eps)
        self._layer(
            stream, self.spec.layers[-1], weights.layer, self._angles(batch), batch.attention, cache
        )
        out_TD = stream.value()
        rows_R = batch.logits_rows_R
        wanted_RD = out_TD if rows_R is None else out_TD[rows_R]
        normed = self.ops.rms_norm(wanted_RD, weights.final_norm, eps)
        return self._logits(normed, weights.head), out_TD

    def final_normed(self, hidden_TD: Tensor) -> Tensor:
        """Return the residual stream behind the final norm: what the output projection sees."""
        return self.ops.rms_norm(hidden_TD, self._final_norm, self.spec.norm_eps)

    def _embed(self, token_ids_T: Tensor) -> Tensor:
        x_TD = self.ops.embedding(token_ids_T, self._embedding_VD)
        if self.spec.embedding_scale != 1.0:
            # Rounded to the compute dtype first, as the reference implementations do.
            x_TD = x_TD * torch.tensor(self.spec.embedding_scale, dtype=x_TD.dtype).item()
        return x_TD

    def _angles(self, batch: StepBatch) -> Angles:
        highest = max(batch.attention.context_lens, default=1) - 1
        return {spec: table.at(batch.positions_T, highest) for spec, table in self._ropes.items()}

    def _logits(self, normed_RD: Tensor, head: object) -> Tensor:
        logits = head(normed_RD).float()  # type: ignore[operator]
        if self.spec.logit_scale != 1.0:
            logits = logits * self.spec.logit_scale
        if self.spec.logit_softcap is not None:
            logits = self.ops.softcap(logits, self.spec.logit_softcap)
        return logits

    def _layer(
        self,
        stream: Residual,
        spec: LayerSpec,
        weights: LayerWeights,
        angles: Angles,
        batch: AttentionBatch,
        cache: LayerCache,
    ) -> None:
        x_TD = stream.normed(weights.pre_attn_norm)
        if isinstance(weights.attention, MlaWeights):
            mixed = self._mla(x_TD, spec.attention, weights.attention, angles, batch, cache)
        else:
            mixed = self._gqa(x_TD, spec.attention, weights.attention, angles, batch, cache)
        stream.add(mixed, weights.post_attn_norm, spec.residual_scale)
        x_TD = stream.normed(weights.pre_ffn_norm)
        if isinstance(weights.ffn, MoeWeights):
            assert isinstance(spec.ffn, MoeSpec)
            out = self._moe(x_TD, spec.ffn, weights.ffn)
        else:
            assert isinstance(spec.ffn, MlpSpec)
            out = self._mlp(x_TD, spec.ffn, weights.ffn)
        stream.add(out, weights.post_ffn_norm, spec.residual_scale)

    def _gqa(
        self,
        x_TD: Tensor,
        spec: AttentionSpec,
        weights: GqaWeights,
        angles: Angles,
        batch: AttentionBatch,
        cache: LayerCache,
    ) -> Tensor:
        ops, heads, groups, dim = self.ops, spec.num_heads, spec.num_kv_heads, spec.head_dim
        q, k, v = weights.qkv(x_TD).split((heads * dim, groups * dim, groups * dim), dim=-1)
        if spec.qk_norm == "full":
            q = ops.rms_norm(q, weights.q_norm, self.spec.norm_eps)
            k = ops.rms_norm(k, weights.k_norm, self.spec.norm_eps)
        q_TNH, k_TGH = q.unflatten(-1, (heads, dim)), k.unflatten(-1, (groups, dim))
        v_TGH = v.unflatten(-1, (groups, dim))
        if spec.qk_norm == "head":
            q_TNH = ops.rms_norm(q_TNH, weights.q_norm, self.spec.norm_eps)
            k_TGH = ops.rms_norm(k_TGH, weights.k_norm, self.spec.norm_eps)
        if spec.rope:
            cos_TR, sin_TR = angles[spec.rope]
            q_TNH, k_TGH = ops.rope(q_TNH, k_TGH, cos_TR, sin_TR, spec.rope.is_interleaved)
        ops.kv_write(k_TGH, v_TGH, cache.k, cache.v, batch.slots_T)
        out_TNH = ops.paged_attention(
            q_TNH, cache.k, cache.v, batch, spec.scale, spec.window, spec.softcap
        )
        return weights.out(out_TNH.flatten(-2))

    def _mla(
        self,
        x_TD: Tensor,
        spec: AttentionSpec,
        weights: MlaWeights,
        angles: Angles,
        batch: AttentionBatch,
        cache: LayerCache,
    ) -> Tensor:
        """Latent attention in its absorbed form: queries go to the latent space, values come back.

        Scores q·(W l) are computed as (Wᵀ q)·l, so that the cache of one latent serves all heads.
        """
        ops, mla = self.ops, spec.mla
        assert mla is not None
        assert spec.rope is not None
        q_TNC = self._mla_query(x_TD, weights, mla.norm_eps).unflatten(
            -1, (spec.num_heads, spec.head_dim)
        )
        q_nope, q_rope = q_TNC.split((mla.nope_dim, mla.rope_dim), dim=-1)
        latent, k_rope = weights.kv_a(x_TD).split((mla.kv_lora_rank, mla.rope_dim), dim=-1)
        latent_TL = ops.rms_norm(latent, weights.kv_a_norm, mla.norm_eps)
        cos_TR, sin_TR = angles[spec.rope]
        q_rope, k_rope = ops.rope(
            q_rope, k_rope.unsqueeze(1), cos_TR, sin_TR, spec.rope.is_interleaved
        )
        key = torch.cat((latent_TL.unsqueeze(1), k_rope), dim=-1)
        ops.kv_write(key, None, cache.k, None, batch.slots_T)
        query = torch.cat((weights.key_up(q_nope), q_rope), dim=-1)
        mixed_TNL = ops.mla_attention(query, cache.k, batch, spec.scale, mla.kv_lora_rank)
        return weights.out(weights.value_up(mixed_TNL).flatten(-2))

    def _mla_query(self, x_TD: Tensor, weights: MlaWeights, eps: float) -> Tensor:
        if weights.q is not None:
            return weights.q(x_TD)
        assert weights.q_a is not None
        assert weights.q_b is not None
        return weights.q_b(self.ops.rms_norm(weights.q_a(x_TD), weights.q_a_norm, eps))

    def _mlp(self, x_TD: Tensor, spec: MlpSpec, weights: MlpWeights) -> Tensor:
        up = weights.gate_up(x_TD)
        if spec.is_gated:
            return weights.down(self.ops.glu(up, spec.activation))
        return weights.down(self.ops.activation(up, spec.activation))

    def _moe(self, x_TD: Tensor, spec: MoeSpec, weights: MoeWeights) -> Tensor:
        logits_TE = torch.nn.functional.linear(x_TD.float(), weights.router_ED)
        chosen_weights, chosen = self.ops.route(logits_TE, weights.router_bias_E, spec.router)
        out = self.ops.moe(
            x_TD, chosen_weights, chosen, weights.gate_up_EFD, weights.down_EDI, spec.activation
        )
        if weights.shared is not None and spec.shared is not None:
            shared = self._mlp(x_TD, spec.shared, weights.shared)
            if weights.shared_gate_1D is not None:
                gate = torch.nn.functional.linear(x_TD, weights.shared_gate_1D)
                shared = shared * torch.sigmoid(gate)
            out = out + shared
        return out
