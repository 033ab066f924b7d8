"""From a model's spec to the row of layers that the planner works with. Start at `read_shape`.

Exact in parameters. Work counts matrix products only (2 flop for a multiply and an add), attention
over the tokens that a causal mask or a window leaves. What is kept until backward says `kept`.
Under tensor parallelism the runner leaves embedding, head, norms and the residual stream whole.
Knows no tensors and no weights: a `config.json` is enough. Legend: D hidden, N query heads, G
key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mxn.errors import UnsupportedError, UserError
from mxn.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlaSpec, MlpSpec, MoeSpec
from mxn.train.kept import Kept
from mxn.train.plan.shape import LayerShape, ModelShape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    if dtype not in BYTES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(BYTES)}")
    size, biases = BYTES[dtype], biases or Biases()
    kept = Kept(spec, seq_tokens, size, is_packed)
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
        whole_params=spec.vocab_size * spec.hidden,
        is_output_whole=True,
    )


def _head(spec: DecoderSpec, kept: Kept) -> LayerShape:
    """Final norm, logits and loss. Its matrix is counted here also when it is the embedding's."""
    matrix = spec.vocab_size * spec.hidden
    return LayerShape(
        kind="head",
        params=matrix + spec.hidden,
        forward_flop=2.0 * matrix,
        activation_bytes=float(kept.head()),
        output_bytes=0.0,
        whole_params=matrix + spec.hidden,
        whole_bytes=float(kept.head()),
    )


def _block(
    spec: DecoderSpec, layer: LayerSpec, kind: str, kept: Kept, biases: Biases
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
        whole_params=norms + attention.whole + _whole_ffn_params(spec.hidden, layer.ffn, biases),
        whole_bytes=float(kept.whole(layer)),
        is_output_whole=True,
    )


class _Attention:
    """Parameters and work of the attention of a layer; `whole`: those tensor parallelism leaves."""

    def __init__(self, hidden: int, spec: AttentionSpec, biases: Biases) -> None:
        self.spec = spec
        if spec.mla:
            self.matrix, self.other = _mla_params(hidden, spec, spec.mla, biases)
            rank = spec.mla.q_lora_rank or 0
            down = hidden * (spec.mla.kv_lora_rank + spec.mla.rope_dim + rank)
            self.whole = self.other + down
            return
        heads, groups, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        qkv = (heads + 2 * groups) * dim
        self.matrix = hidden * (qkv + heads * dim)
        self.other = qkv * biases.qkv + hidden * biases.attn_out
        if spec.qk_norm == "head":
            self.other += 2 * dim
        elif spec.qk_norm == "full":
            self.other += (heads + groups) * dim
        self.whole = hidden * biases.attn_out + 2 * dim * (spec.qk_norm == "head")

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


def _whole_ffn_params(hidden: int, ffn: MlpSpec | MoeSpec, biases: Biases) -> int:
    """Return those that each device of a tensor-parallel stage has whole."""
    if isinstance(ffn, MlpSpec):
        return hidden * biases.mlp
    shared = _whole_ffn_params(hidden, ffn.shared, biases) if ffn.shared else 0
    return shared + hidden * (ffn.router.num_experts + ffn.has_shared_gate)


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
