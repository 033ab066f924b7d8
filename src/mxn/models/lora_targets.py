"""Where the modules that an adapter names live in a model of ours: fused, renamed, split by heads.

A `Slot` holds one callable weight; a `Target` is the part of a slot, or of two, that one module of
transformers became. Knows weights and names; knows no adapters under way. Start at `targets_of`.
Shape letters: see `decoder.py`; F outputs of a module, R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mxn.errors import UnsupportedError
from mxn.models.spec import AttentionSpec, DecoderSpec, MlpSpec, MoeSpec
from mxn.models.weights import MlaWeights, MlpWeights, MoeWeights, ungroup_qkv

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.models.decoder import Decoder
    from mxn.models.fallback.decoder import FallbackDecoder
    from mxn.models.names import Names

Rows = Literal["tokens", "logits"]


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """The attribute of an object where a weight sits that maps rows to rows."""

    owner: Any
    attribute: str
    out_features: int
    rows: Rows = "tokens"  # which rows of a step pass through
    is_per_head: bool = False  # rows are [T, N, I], each head has its own matrix

    def get(self) -> Any:
        return getattr(self.owner, self.attribute)

    def set(self, weight: Any) -> None:
        setattr(self.owner, self.attribute, weight)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one pair adds to one slot: x @ down @ up, to the outputs from `first` on.

    Shapes: down [D, R], up [R, F]; per head [N, I, R] or [I, R], and [N, R, O] or [R, O].
    """

    slot: Slot
    down: Tensor
    up: Tensor
    first: int = 0


class Target(Protocol):
    """One module of transformers."""

    in_features: int
    out_features: int

    def pieces(self, a_RD: Tensor, b_FR: Tensor) -> list[Piece]:
        """Return what a pair of exactly these shapes adds, `b_FR` being scaled already."""
        ...


@dataclass(frozen=True, slots=True)
class LinearTarget:
    """A module whose outputs are those of a slot, or some of them that stand side by side."""

    slot: Slot
    in_features: int
    out_features: int
    first: int = 0
    reorder: Callable[[Tensor], Tensor] | None = None  # of outputs that are stored in other order

    def pieces(self, a_RD: Tensor, b_FR: Tensor) -> list[Piece]:
        b_FR = self.reorder(b_FR) if self.reorder else b_FR
        return [Piece(self.slot, a_RD.t(), b_FR.t(), self.first)]


@dataclass(frozen=True, slots=True)
class LatentTarget:
    """The up-projection of MLA, which attention in its absorbed form applies in two halves."""

    key: Slot  # [T, N, P] -> [T, N, L]
    value: Slot  # [T, N, L] -> [T, N, J]
    num_heads: int
    nope_dim: int
    in_features: int
    out_features: int

    def pieces(self, a_RD: Tensor, b_FR: Tensor) -> list[Piece]:
        b_NCR = b_FR.unflatten(0, (self.num_heads, -1))
        keys_NPR, values_NJR = b_NCR[:, : self.nope_dim], b_NCR[:, self.nope_dim :]
        return [
            Piece(self.key, keys_NPR, a_RD),
            Piece(self.value, a_RD.t(), values_NJR.transpose(1, 2)),
        ]


def targets_of(model: Any) -> dict[str, Target]:
    """Return every module that takes an adapter, by its name in transformers.

    Raises: UnsupportedError for a model that takes none.
    """
    from mxn.models.decoder import Decoder
    from mxn.models.fallback.decoder import FallbackDecoder

    if isinstance(model, Decoder) and model.names is not None:
        return _native(model, model.names)
    if isinstance(model, FallbackDecoder):
        return _fallback(model)
    raise UnsupportedError(
        f"{type(model).__name__} takes no adapters",
        hint="packed weights take none: serve the model without --weights, or add one adapter to"
        " its weights with `mxn pack --merge-lora`",
    )


def why_no_target(module: str, targets: dict[str, Target]) -> str:
    """Return why an adapter may not name `module`."""
    if ".experts" in module:
        return f"{module!r} belongs to an expert; mxn adapts what all tokens pass through"
    last = module.rsplit(".", 1)[-1]
    if last in ("gate", "shared_expert_gate"):
        return f"{module!r} chooses among experts; mxn adapts what tokens pass through afterwards"
    if last in ("embed_tokens", "tok_embeddings", "wte"):
        return f"{module!r} is the embedding, which is not adapted"
    kinds = sorted({name.rsplit(".", 1)[-1] for name in targets})
    return f"this model has no layer {module!r}; its layers have {', '.join(kinds)}"


def _native(model: Decoder, names: Names) -> dict[str, Target]:
    spec, found = model.spec, dict[str, Target]()
    for index, (layer, weights) in enumerate(zip(spec.layers, model.layers, strict=True)):
        prefix = names.layer.format(i=index)
        attention = weights.attention
        if isinstance(attention, MlaWeights):
            found |= _mla(prefix, names, spec, layer.attention, attention)
        else:
            found |= _gqa(prefix, names, spec, layer.attention, attention)
        if isinstance(weights.ffn, MoeWeights):
            assert isinstance(layer.ffn, MoeSpec)
            if weights.ffn.shared is not None and layer.ffn.shared is not None:
                parts, down = names.shared_gate_up, names.shared_down
                found |= _mlp(prefix, parts, down, spec, layer.ffn.shared, weights.ffn.shared)
        else:
            assert isinstance(layer.ffn, MlpSpec)
            found |= _mlp(prefix, names.gate_up, names.down, spec, layer.ffn, weights.ffn)
    head = Slot(model, "head", spec.vocab_size, rows="logits")
    found[names.head] = LinearTarget(head, spec.hidden, spec.vocab_size)
    return found


def _whole(owner: Any, attribute: str, in_features: int, out_features: int) -> LinearTarget:
    return LinearTarget(Slot(owner, attribute, out_features), in_features, out_features)


def _gqa(
    prefix: str, names: Names, model: DecoderSpec, spec: AttentionSpec, weights: Any
) -> dict[str, Target]:
    heads, groups, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    sizes = (heads * dim, groups * dim, groups * dim)
    slot = Slot(weights, "qkv", sum(sizes))
    found: dict[str, Target] = {
        prefix + names.attn_out: _whole(weights, "out", heads * dim, model.hidden)
    }
    if len(names.qkv) == 1:
        is_grouped = names.qkv_layout == "grouped"
        found[prefix + names.qkv[0]] = LinearTarget(
            slot,
            model.hidden,
            sum(sizes),
            reorder=(lambda b_FR: ungroup_qkv(b_FR, spec)) if is_grouped else None,
        )
        return found
    return found | _side_by_side(prefix, names.qkv, sizes, slot, model.hidden)


def _side_by_side(
    prefix: str, parts: tuple[str, ...], sizes: tuple[int, ...], slot: Slot, in_features: int
) -> dict[str, Target]:
    found: dict[str, Target] = {}
    first = 0
    for name, size in zip(parts, sizes, strict=True):
        found[prefix + name] = LinearTarget(slot, in_features, size, first)
        first += size
    return found


def _mlp(
    prefix: str,
    parts: tuple[str, ...],
    down: str,
    model: DecoderSpec,
    spec: MlpSpec,
    weights: MlpWeights,
) -> dict[str, Target]:
    width = spec.intermediate
    total = width * (2 if spec.is_gated else 1)
    slot = Slot(weights, "gate_up", total)
    sizes = (total,) if len(parts) == 1 else (width,) * len(parts)
    found = _side_by_side(prefix, parts, sizes, slot, model.hidden)
    found[prefix + down] = _whole(weights, "down", width, model.hidden)
    return found


def _mla(
    prefix: str, names: Names, model: DecoderSpec, spec: AttentionSpec, weights: MlaWeights
) -> dict[str, Target]:
    mla, heads = spec.mla, spec.num_heads
    assert mla is not None
    query, rank = heads * spec.head_dim, mla.kv_lora_rank
    found: dict[str, Target] = {
        prefix + names.mla_kv_a: _whole(weights, "kv_a", model.hidden, rank + mla.rope_dim),
        prefix + names.attn_out: _whole(weights, "out", heads * mla.v_dim, model.hidden),
        prefix + names.mla_kv_b: LatentTarget(
            Slot(weights, "key_up", rank, is_per_head=True),
            Slot(weights, "value_up", mla.v_dim, is_per_head=True),
            heads,
            mla.nope_dim,
            in_features=rank,
            out_features=heads * (mla.nope_dim + mla.v_dim),
        ),
    }
    if mla.q_lora_rank is None:
        found[prefix + names.mla_q] = _whole(weights, "q", model.hidden, query)
    else:
        found[prefix + names.mla_q_a] = _whole(weights, "q_a", model.hidden, mla.q_lora_rank)
        found[prefix + names.mla_q_b] = _whole(weights, "q_b", mla.q_lora_rank, query)
    return found


def _fallback(decoder: FallbackDecoder) -> dict[str, Target]:
    """Return the swapped linears; those of experts see chosen rows only and are left out."""
    from mxn.models.fallback.linear import KernelLinear

    head = decoder.model.get_output_embeddings()
    found: dict[str, Target] = {}
    for name, module in decoder.model.named_modules():
        if not isinstance(module, KernelLinear) or ".experts" in name:
            continue
        rows: Rows = "logits" if module is head and decoder.selects_rows else "tokens"
        slot = Slot(module, "_kernel", module.out_features, rows=rows)
        found[name] = LinearTarget(slot, module.in_features, module.out_features)
    return found
