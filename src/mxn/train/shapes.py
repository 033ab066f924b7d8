"""From a model's spec to the row of layers that the planner works with. Start at `read_shape`.

Exact in parameters. Work counts matrix products only (2 flop for a multiply and an add), attention
over the tokens that a causal mask or a window leaves. What is kept until backward follows what
`train/run/net.py` saves and is checked against it by a test. Knows no tensors and no weights: a
`config.json` is enough. Legend: D hidden, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mxn.errors import UnsupportedError, UserError
from mxn.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlaSpec, MlpSpec, MoeSpec
from mxn.train.plan.shape import LayerShape, ModelShape

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_INDEX_BYTES = 8  # of a label, or of the number of a row
PIECE_BYTES = 64 * 2**20  # as in `run/net/losses.py`, which imports torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Biases:
    """Which linear layers of a family have a bias. No spec says so: loading sees the tensors."""

    qkv: bool = False  # with MLA: the two projections down to the latents
    attn_out: bool = False
    mlp: bool = False


def read_shape(directory: Path, *, seq_tokens: int, dtype: str = "float32") -> ModelShape:
    """Return the shape of the model in `directory`, which needs no more than its config.json.

    Raises: UnsupportedError for a family without a native spec; NotFoundError without config.json.
    """
    from mxn.models.families import find_decoder, why_not_native
    from mxn.models.families.config import load_config
    from mxn.models.storage import read_json

    config_json = read_json(directory / "config.json")
    family = find_decoder(config_json)
    if family is None:
        reason = why_not_native(config_json) or "no native spec for its architecture"
        raise UnsupportedError(
            f"{directory.name} cannot be trained: {reason}",
            hint="`mxn models --families` lists the native families",
        )
    config = load_config(directory, config_json)
    biases = biases_of(family.name, config)
    shape = model_shape(
        family.spec(config), name=directory.name, seq_tokens=seq_tokens, dtype=dtype, biases=biases
    )
    if seq_tokens > config.max_position_embeddings:
        raise UserError(
            f"{seq_tokens} tokens in a row, but {directory.name} has positions for "
            f"{config.max_position_embeddings}",
            hint=f"ask for at most {config.max_position_embeddings}",
        )
    return shape


def biases_of(family: str, config: Any) -> Biases:
    """Return which biases the checkpoints of a family have, as the code of its makers says."""

    def has(name: str, default: bool = False) -> bool:
        return bool(getattr(config, name, default))

    special: dict[str, Callable[[], Biases]] = {
        "qwen2": lambda: Biases(qkv=True),
        "qwen2_moe": lambda: Biases(qkv=has("qkv_bias", True)),
        "glm": lambda: Biases(qkv=has("attention_bias")),
        "glm4": lambda: Biases(qkv=has("attention_bias")),
        "internlm": lambda: Biases(
            qkv=has("attention_bias") or has("qkv_bias", has("bias")),
            attn_out=has("attention_bias") or has("bias"),
            mlp=has("mlp_bias") or (has("bias") and hasattr(config, "qkv_bias")),  # InternLM 3
        ),
        "internlm2": lambda: Biases(qkv=has("bias"), attn_out=has("bias")),
    }
    if family in special:
        return special[family]()
    attention = has("attention_bias")
    return Biases(qkv=attention, attn_out=attention, mlp=has("mlp_bias"))


def model_shape(
    spec: DecoderSpec,
    *,
    name: str,
    seq_tokens: int,
    dtype: str = "float32",
    biases: Biases | None = None,
    is_packed: bool = False,
) -> ModelShape:
    """Return the planner's view of `spec` at rows of `seq_tokens` tokens computed in `dtype`.

    `is_packed`: rows hold several documents, so attention keeps a mask.
    """
    if seq_tokens < 1:
        raise UserError(f"a row needs at least 1 token, got {seq_tokens}")
    if dtype not in _BYTES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(_BYTES)}")
    size, biases = _BYTES[dtype], biases or Biases()
    kept = _Kept(spec, seq_tokens, size, is_packed)
    kinds = layer_kinds(spec)
    blocks = {
        kind: _block(spec, layer, kind, kept, biases)
        for kind, layer in zip(kinds[1:-1], spec.layers, strict=True)
    }
    rows = (_embedding(spec, size), *(blocks[kind] for kind in kinds[1:-1]), _head(spec, kept))
    return ModelShape(name=name, layers=rows, seq_tokens=seq_tokens, is_tied=spec.is_tied)


def layer_kinds(spec: DecoderSpec) -> tuple[str, ...]:
    """Return the kind of each plan layer. Blocks that cost the same share one.

    "block", "block.moe", with ".window" behind where attention sees a window; further ones of the
    same description are numbered.
    """
    names: dict[LayerSpec, str] = {}
    for layer in spec.layers:
        key = _cost_key(layer)
        if key not in names:
            base = "block" + (".moe" if isinstance(layer.ffn, MoeSpec) else "")
            base += ".window" if layer.attention.window is not None else ""
            same = sum(name.rstrip("0123456789.") == base for name in names.values())
            names[key] = f"{base}.{same + 1}" if same else base
    return ("embedding", *(names[_cost_key(layer)] for layer in spec.layers), "head")


def _cost_key(layer: LayerSpec) -> LayerSpec:
    """A layer without what changes numbers but not costs."""
    attention = replace(layer.attention, rope=None, scale=1.0)
    return replace(layer, attention=attention, residual_scale=1.0)


# -- layers ------------------------------------------------------------------------------------


def _embedding(spec: DecoderSpec, size: int) -> LayerShape:
    return LayerShape(
        kind="embedding",
        params=spec.vocab_size * spec.hidden,
        forward_flop=0.0,
        activation_bytes=0.0,  # only the token ids, which belong to the batch
        output_bytes=float(spec.hidden * size),
        active_params=spec.hidden,
    )


def _head(spec: DecoderSpec, kept: _Kept) -> LayerShape:
    """Final norm, logits and loss. Its matrix is counted here also when it is the embedding's."""
    matrix = spec.vocab_size * spec.hidden
    return LayerShape(
        kind="head",
        params=matrix + spec.hidden,
        forward_flop=2.0 * matrix,
        activation_bytes=float(kept.head()),
        output_bytes=0.0,
    )


def _block(
    spec: DecoderSpec, layer: LayerSpec, kind: str, kept: _Kept, biases: Biases
) -> LayerShape:
    attention = _Attention(spec.hidden, layer.attention, biases)
    ffn_matrix, ffn_other, ffn_active = _ffn_params(spec.hidden, layer.ffn, biases)
    norms = spec.hidden * 2 * (layer.has_pre_norm + layer.has_post_norm)
    params = attention.matrix + attention.other + ffn_matrix + ffn_other + norms
    inactive = ffn_matrix - ffn_active
    flop = 2.0 * (attention.matrix + ffn_active) + attention.context_flop(kept.seq_tokens)
    return LayerShape(
        kind=kind,
        params=params,
        forward_flop=flop,
        activation_bytes=float(kept.block(layer)),
        core_bytes=float(kept.core(layer.attention)),
        output_bytes=float(spec.hidden * kept.size),
        active_params=params - inactive if inactive else None,
        routed_to=layer.ffn.router.top_k if isinstance(layer.ffn, MoeSpec) else 1,
    )


class _Attention:
    """Parameters and work of the attention of a layer."""

    def __init__(self, hidden: int, spec: AttentionSpec, biases: Biases) -> None:
        self.spec = spec
        if spec.mla:
            self.matrix, self.other = _mla_params(hidden, spec, spec.mla, biases)
            return
        heads, groups, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        qkv = (heads + 2 * groups) * dim
        self.matrix = hidden * (qkv + heads * dim)
        self.other = qkv * biases.qkv + hidden * biases.attn_out
        if spec.qk_norm == "head":
            self.other += 2 * dim
        elif spec.qk_norm == "full":
            self.other += (heads + groups) * dim

    def context_flop(self, seq_tokens: int) -> float:
        """Scores and mixing, of a token on average."""
        seen = mean_context(seq_tokens, self.spec.window)
        v_dim = self.spec.mla.v_dim if self.spec.mla else self.spec.head_dim
        return 2.0 * self.spec.num_heads * (self.spec.head_dim + v_dim) * seen


def mean_context(seq_tokens: int, window: int | None) -> float:
    """Return how many tokens a token sees on average, itself included.

    >>> mean_context(4, None), mean_context(4, 2)
    (2.5, 1.75)
    """
    if window is None or window >= seq_tokens:
        return (seq_tokens + 1) / 2
    return (window * (window + 1) / 2 + (seq_tokens - window) * window) / seq_tokens


def _mla_params(hidden: int, spec: AttentionSpec, mla: MlaSpec, biases: Biases) -> tuple[int, int]:
    heads, query = spec.num_heads, spec.num_heads * (mla.nope_dim + mla.rope_dim)
    matrix = hidden * (mla.kv_lora_rank + mla.rope_dim)
    matrix += mla.kv_lora_rank * heads * (mla.nope_dim + mla.v_dim)
    matrix += heads * mla.v_dim * hidden
    other = mla.kv_lora_rank + (mla.kv_lora_rank + mla.rope_dim) * biases.qkv
    other += hidden * biases.attn_out
    if mla.q_lora_rank is None:
        return matrix + hidden * query, other
    matrix += (hidden + query) * mla.q_lora_rank
    return matrix, other + mla.q_lora_rank * (1 + biases.qkv)


def _ffn_params(hidden: int, ffn: MlpSpec | MoeSpec, biases: Biases) -> tuple[int, int, int]:
    """Return weights of matrices, of the rest, and those of matrices that a token passes."""
    if isinstance(ffn, MlpSpec):
        parts = 1 + ffn.is_gated
        matrix = (parts + 1) * hidden * ffn.intermediate
        return matrix, (parts * ffn.intermediate + hidden) * biases.mlp, matrix
    router, expert = hidden * ffn.router.num_experts, 3 * hidden * ffn.intermediate
    shared, other, _ = _ffn_params(hidden, ffn.shared, biases) if ffn.shared else (0, 0, 0)
    shared += router + hidden * ffn.has_shared_gate
    active = shared + ffn.router.top_k * expert
    return shared + ffn.router.num_experts * expert, other, active


# -- what backward needs -----------------------------------------------------------------------
# Bytes of one token, by what autograd keeps of the operators of `run/net`. A product keeps its
# input; a factor is kept only where the other one has a gradient, so rotation keeps no queries.


@dataclass(frozen=True, slots=True)
class _Kept:
    """`size` bytes of a value in the dtype that computes; norms, routing and losses use float32."""

    spec: DecoderSpec
    seq_tokens: int
    size: int
    is_packed: bool

    def block(self, layer: LayerSpec) -> float:
        pre = layer.has_pre_norm
        attention, ffn = self.attention(layer.attention), self.ffn(layer.ffn)
        inputs = self.input(pre) + self.input(pre, is_kept=self.keeps_ffn_input(layer.ffn))
        return inputs + attention + ffn + 2 * layer.has_post_norm * self.norm(self.spec.hidden)

    def norm(self, width: int) -> float:
        """Its input and itself before the weight, without its output."""
        return 4 * width + 4 + (4 if self.spec.is_norm_offset else self.size) * width

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
        """The latents behind their norms; in float32 the keys' rotated part lies beside one."""
        beside = mla.rope_dim * 4 if self.size == 4 else 0
        kept = self.norm(mla.kv_lora_rank) + beside + self.size * mla.kv_lora_rank
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
