"""What a model is, as data: a decoder or an encoder described over the operators of the contract.

Knows no tensors, files or devices. A family (`models/families/<family>.py`) turns a Hugging Face
config into one of these; `models/decoder.py` and `models/encoder.py` interpret them. Start at
`DecoderSpec`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mxn.kernels.params import Activation, RouterSpec

__all__ = [
    "Activation",
    "AttentionSpec",
    "DecoderSpec",
    "EncoderSpec",
    "KvShape",
    "LayerSpec",
    "MlaSpec",
    "MlpSpec",
    "MoeSpec",
    "RopeSpec",
    "RouterSpec",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding of the first ``2 * len(inv_freq)`` dims of a head."""

    inv_freq: tuple[float, ...]
    scale: float = 1.0  # multiplies cos and sin (YaRN, LongRoPE)
    is_interleaved: bool = False  # pairs (0,1)(2,3)… instead of (0,R/2)(1,R/2+1)…

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaSpec:
    """Multi-head latent attention: the cache holds one latent vector for all heads."""

    q_lora_rank: int | None  # None: queries come straight from the hidden state
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    norm_eps: float = 1e-6  # of the latent norms; the reference code does not use the model's


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec | None
    window: int | None = None  # a query sees itself and the window - 1 tokens before it
    softcap: float | None = None
    qk_norm: Literal["none", "head", "full"] = "none"  # over each head, or over all heads together
    mla: MlaSpec | None = None

    @property
    def kv_shape(self) -> KvShape:
        """What one token stores in the cache of this layer."""
        if self.mla:
            return KvShape(num_heads=1, k_dim=self.mla.kv_lora_rank + self.mla.rope_dim, v_dim=0)
        return KvShape(num_heads=self.num_kv_heads, k_dim=self.head_dim, v_dim=self.head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """Cache of one layer per token: `num_heads` keys of `k_dim`, values of `v_dim`.

    ``v_dim == 0``: values are a part of the keys (MLA), there is no value cache.
    """

    num_heads: int
    k_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` when not gated."""

    intermediate: int
    activation: Activation
    is_gated: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    router: RouterSpec
    intermediate: int
    activation: Activation
    shared: MlpSpec | None = None
    has_shared_gate: bool = False  # sigmoid(w · x) multiplies the shared expert (Qwen2-MoE)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    attention: AttentionSpec
    ffn: MlpSpec | MoeSpec
    has_pre_norm: bool = True  # x + f(norm(x))
    has_post_norm: bool = False  # x + norm(f(…))
    residual_scale: float = 1.0  # x + residual_scale * f(…)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A decoder-only language model."""

    family: str
    vocab_size: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    max_positions: int
    is_norm_offset: bool = False  # the stored norm weight is w - 1 (Gemma)
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    is_tied: bool = False  # the output projection is the embedding table
    num_mtp_layers: int = 0  # multi-token-prediction layers behind the last one (DeepSeek-V3)
    eos_ids: tuple[int, ...] = field(default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """A BERT-like encoder, for embeddings or for sequence classification."""

    family: str
    vocab_size: int
    hidden: int
    num_layers: int
    num_heads: int
    intermediate: int
    activation: Activation
    norm_eps: float
    max_positions: int  # tokens a caller may send
    position_offset: int = 0  # RoBERTa counts from padding_idx + 1
    num_token_types: int = 2
    num_labels: int = 0  # > 0: a classification head stands on it
    head: Literal["none", "pooler", "roberta"] = "none"
    pooling: Literal["cls", "mean", "last"] = "mean"
    is_normalized: bool = False
    embedding_dim: int = 0  # of a projection behind the pooling; 0: there is none
