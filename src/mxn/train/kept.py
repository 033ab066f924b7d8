"""What autograd keeps of a token until backward, by the operators of `run/net`. Start at `Kept`.

A product keeps its input; a factor is kept only where the other one has a gradient, so rotation
keeps no queries. A test holds it to what torch really saves. Knows no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from mxn.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlaSpec, MlpSpec, MoeSpec

_INDEX_BYTES = 8  # of a label, or of the number of a row
PIECE_BYTES = 64 * 2**20  # as in `run/net/losses.py`, which imports torch


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of a token. `size`: of a value in the dtype that computes; norms, routing and losses
    use float32.
    """

    spec: DecoderSpec
    seq_tokens: int
    size: int
    is_packed: bool

    def block(self, layer: LayerSpec) -> float:
        pre = layer.has_pre_norm
        attention, ffn = self.attention(layer.attention), self.ffn(layer.ffn)
        inputs = self.input(pre) + self.input(pre, is_kept=self.keeps_ffn_input(layer.ffn))
        return inputs + attention + ffn + 2 * layer.has_post_norm * self.norm(self.spec.hidden)

    def whole(self, layer: LayerSpec) -> float:
        """Of `block`, what tensor parallelism leaves whole on each device: what branches begin
        with and norms behind them, positions, latents, routing and what experts are given.
        """
        pre, attention, ffn = layer.has_pre_norm, layer.attention, layer.ffn
        kept = self.input(pre) + self.input(pre, is_kept=self.keeps_ffn_input(ffn))
        kept += 2 * layer.has_post_norm * self.norm(self.spec.hidden)
        if attention.mla:
            kept += self.mla_parts(attention, attention.mla)
        else:
            kept += self.angles(attention) + self.mask(attention)
        if isinstance(ffn, MoeSpec):
            gate = ffn.has_shared_gate * self.size * (self.spec.hidden + 2)
            given = self.spec.hidden * self.size + 8 * self.spec.hidden + 20
            kept += self.routing(ffn) + ffn.router.top_k * given + gate
        return kept

    def norm(self, width: int) -> float:
        """Its input and the reciprocal of its rms, without its output."""
        return self.size * width + 4

    def input(self, is_normed: bool, *, is_kept: bool = True) -> float:
        """What a branch begins with."""
        hidden = self.spec.hidden
        return is_normed * self.norm(hidden) + is_kept * self.size * hidden

    def keeps_ffn_input(self, ffn: MlpSpec | MoeSpec) -> bool:
        """Experts are given copies of it, and the router one in float32."""
        return isinstance(ffn, MlpSpec) or ffn.shared is not None or self.size == 4

    def attention(self, spec: AttentionSpec) -> float:
        if spec.mla:
            return self.mla_parts(spec, spec.mla) + self.scores(spec, spec.mla.v_dim)
        heads, groups, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        norms = 0.0
        if spec.qk_norm == "head":
            norms = (heads + groups) * self.norm(dim)
        elif spec.qk_norm == "full":
            norms = self.norm(heads * dim) + self.norm(groups * dim)
        return norms + self.angles(spec) + self.scores(spec, dim)

    def scores(self, spec: AttentionSpec, v_dim: int) -> float:
        """Queries, keys, values, the result, and the probabilities where torch keeps them.

        It does for values that are not as wide as keys, which a CPU computes in float32, and for
        capped scores; elsewhere the logarithm of their sum is enough.
        """
        heads, dim, size = spec.num_heads, spec.head_dim, self.size
        result = heads * v_dim * size
        if spec.softcap is not None:
            parts = heads * (2 * dim + v_dim) * size
            wide = 0 if size == 4 else 4
            return parts + result + heads * self.seq_tokens * (2 * size + wide + 1)
        if v_dim != dim:
            return result + 4 * heads * (2 * dim + v_dim + self.seq_tokens)
        groups = spec.num_kv_heads
        return (heads + 2 * groups) * dim * size + result + 4 * heads + self.mask(spec)

    def core(self, spec: AttentionSpec) -> float:
        """Of `scores`, what is not kept when attention is computed again from its inputs."""
        v_dim = spec.mla.v_dim if spec.mla else spec.head_dim
        groups = spec.num_heads if spec.mla else spec.num_kv_heads
        inputs = spec.num_heads * spec.head_dim + groups * (spec.head_dim + v_dim)
        return self.scores(spec, v_dim) - (inputs + spec.num_heads * v_dim) * self.size

    def mask(self, spec: AttentionSpec) -> float:
        """A mask becomes numbers to add, in each layer anew."""
        has_window = spec.window is not None and spec.window < self.seq_tokens
        return self.size * self.seq_tokens if self.is_packed or has_window else 0

    def angles(self, spec: AttentionSpec) -> float:
        return 4 * spec.rope.rotary_dim if spec.rope else 0

    def mla_parts(self, spec: AttentionSpec, mla: MlaSpec) -> float:
        """The latents behind their norms; the keys' rotated part lies beside one."""
        kept = self.norm(mla.kv_lora_rank) + self.size * (mla.rope_dim + mla.kv_lora_rank)
        if mla.q_lora_rank is not None:
            kept += self.norm(mla.q_lora_rank) + self.size * mla.q_lora_rank
        return kept + self.angles(spec)

    def ffn(self, ffn: MlpSpec | MoeSpec) -> float:
        if isinstance(ffn, MlpSpec):
            return (4 if ffn.is_gated else 2) * ffn.intermediate * self.size
        shared = self.ffn(ffn.shared) if ffn.shared else 0
        gate = ffn.has_shared_gate * self.size * (self.spec.hidden + 2)
        return self.routing(ffn) + self.experts(ffn) + shared + gate

    def routing(self, ffn: MoeSpec) -> float:
        router, hidden = ffn.router, self.spec.hidden
        kept = 4 * router.num_experts + 8 * router.top_k
        kept += 0 if self.size == 4 else 4 * hidden
        if router.normalize:
            kept += 4 * router.top_k + 4
        if router.num_groups > 1:
            best = 2 if router.group_score == "top2_sum" else 1
            kept += (8 * best + 1) * router.num_groups + 8 * router.top_groups
        return kept

    def experts(self, ffn: MoeSpec) -> float:
        """Each chosen one has its own copy of the token; results are joined in float32."""
        inside = (4 * ffn.intermediate + self.spec.hidden) * self.size
        return ffn.router.top_k * (inside + 8 * self.spec.hidden + 20)

    def head(self) -> float:
        """Logits of a large batch are computed again in pieces (`net/losses.py`)."""
        hidden, logits = self.spec.hidden, 4 * self.spec.vocab_size
        if logits * self.seq_tokens > PIECE_BYTES:
            return self.size * hidden + 2 * _INDEX_BYTES
        capped = logits if self.spec.logit_softcap is not None else 0
        return self.input(True) + logits + capped + 2 * _INDEX_BYTES
