"""Compares a decoder's parts with its spec, so that native code never reads past a tensor.

Native memory is indexed by the spec: a config.json or a manifest that says other sizes than the
tensors have would read foreign memory. Knows shapes; reads no values. Start at `check`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mxn.errors import UnsupportedError
from mxn.kernels.native.formats import GROUPS
from mxn.kernels.native.pack import LANES, PackedWeight
from mxn.models.native.reader import NativeMla
from mxn.models.spec import MoeSpec

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.models.native.decoder import NativeParts
    from mxn.models.native.reader import NativeMoe
    from mxn.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec
    from mxn.models.weights import GqaWeights, LayerWeights, MlpWeights, MtpWeights

_HINT = "config.json and the weights do not belong together; bring both again, or pack again"


def check(spec: DecoderSpec, parts: NativeParts) -> None:
    """Raises: UnsupportedError that names the first part whose size `spec` does not say."""
    _equal("layers", len(parts.layers), len(spec.layers))
    _matrix("head", parts.head, spec.vocab_size, spec.hidden)
    _vector("final norm", parts.final_norm, spec.hidden)
    table = parts.table_VD
    if table is not None:
        _equal("embedding", tuple(table.shape), (spec.vocab_size, spec.hidden))
        _true("embedding", table.dtype in (torch.float32, torch.bfloat16), table.dtype, "a float")
        _true("embedding", table.is_contiguous(), table.stride(), "whole rows in order")
    for i, (layer, weights) in enumerate(zip(spec.layers, parts.layers, strict=True)):
        _layer(f"layer {i}", spec, layer, weights)
    for i, weights in enumerate(parts.mtp):
        _prediction(f"prediction layer {i}", spec, weights)


def _prediction(name: str, spec: DecoderSpec, weights: MtpWeights) -> None:
    _matrix(f"{name}: merge", weights.merge, spec.hidden, 2 * spec.hidden)
    for norm in (weights.hidden_norm, weights.token_norm, weights.final_norm):
        _vector(f"{name}: norm", norm, spec.hidden)
    if weights.head is not None:
        _matrix(f"{name}: head", weights.head, spec.vocab_size, spec.hidden)
    _layer(name, spec, spec.layers[-1], weights.layer)


def _layer(name: str, model: DecoderSpec, spec: LayerSpec, weights: LayerWeights) -> None:
    names = ("pre_attn_norm", "post_attn_norm", "pre_ffn_norm", "post_ffn_norm")
    for norm in names:
        has_one = spec.has_pre_norm if norm.startswith("pre") else spec.has_post_norm
        _vector(f"{name}: {norm}", getattr(weights, norm), model.hidden, is_optional=not has_one)
    _attention(name, model.hidden, spec.attention, weights.attention)  # type: ignore[arg-type]
    if isinstance(spec.ffn, MoeSpec):
        _experts(name, model.hidden, spec.ffn, weights.ffn)  # type: ignore[arg-type]
    else:
        _mlp(name, model.hidden, spec.ffn, weights.ffn)  # type: ignore[arg-type]


def _attention(
    name: str, hidden: int, spec: AttentionSpec, weights: GqaWeights | NativeMla
) -> None:
    if isinstance(weights, NativeMla) or spec.mla is not None:
        _latent(name, hidden, spec, weights)  # type: ignore[arg-type]
        return
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    _true(f"{name}: key/value heads", kv_heads > 0 and heads % kv_heads == 0, kv_heads,
          f"a divisor of {heads} heads")  # fmt: skip
    _rope(name, spec, dim)
    _matrix(f"{name}: qkv", weights.qkv, (heads + 2 * kv_heads) * dim, hidden)
    _matrix(f"{name}: attention out", weights.out, hidden, heads * dim)
    wide = spec.qk_norm == "full"
    is_optional = spec.qk_norm == "none"
    _vector(f"{name}: q_norm", weights.q_norm, heads * dim if wide else dim, is_optional)
    _vector(f"{name}: k_norm", weights.k_norm, kv_heads * dim if wide else dim, is_optional)


def _latent(name: str, hidden: int, spec: AttentionSpec, weights: NativeMla) -> None:
    mla = spec.mla
    _true(f"{name}: attention", mla is not None and isinstance(weights, NativeMla),
          type(weights).__name__, "what the config says: latent attention or not")  # fmt: skip
    assert mla is not None
    width = spec.num_heads * (mla.nope_dim + mla.rope_dim)
    _rope(name, spec, mla.rope_dim)
    _true(f"{name}: q", (weights.q is None) == (mla.q_lora_rank is not None), weights.q is not None,
          f"q_lora_rank {mla.q_lora_rank}")  # fmt: skip
    if mla.q_lora_rank is None:
        _matrix(f"{name}: q", weights.q, width, hidden)
    else:
        _matrix(f"{name}: q_a", weights.q_a, mla.q_lora_rank, hidden)
        _vector(f"{name}: q_a_norm", weights.q_a_norm, mla.q_lora_rank)
        _matrix(f"{name}: q_b", weights.q_b, width, mla.q_lora_rank)
    _matrix(f"{name}: kv_a", weights.kv_a, mla.kv_lora_rank + mla.rope_dim, hidden)
    _vector(f"{name}: kv_a_norm", weights.kv_a_norm, mla.kv_lora_rank)
    _equal(f"{name}: heads of keys", len(weights.key_up), spec.num_heads)
    _equal(f"{name}: heads of values", len(weights.value_up), spec.num_heads)
    for key_up, value_up in zip(weights.key_up, weights.value_up, strict=True):
        _matrix(f"{name}: key_up", key_up, mla.kv_lora_rank, mla.nope_dim, is_plain=True)
        _matrix(f"{name}: value_up", value_up, mla.v_dim, mla.kv_lora_rank, is_plain=True)
    _matrix(f"{name}: attention out", weights.out, hidden, spec.num_heads * mla.v_dim)


def _rope(name: str, spec: AttentionSpec, dim: int) -> None:
    if spec.rope is not None:
        rotary = spec.rope.rotary_dim
        _true(f"{name}: rotated dims", rotary <= dim, rotary, f"at most {dim}")


def _mlp(name: str, hidden: int, spec: MlpSpec, weights: MlpWeights) -> None:
    width = -(-spec.intermediate // LANES) * LANES
    rows = 2 * width if spec.is_gated else spec.intermediate
    _matrix(f"{name}: up", weights.gate_up, rows, hidden)
    _matrix(f"{name}: down", weights.down, hidden, spec.intermediate)


def _experts(name: str, hidden: int, spec: MoeSpec, weights: NativeMoe) -> None:
    from mxn.models.spec import MlpSpec

    router = spec.router
    num, groups = router.num_experts, router.num_groups
    _equal(f"{name}: experts", len(weights.experts), num)
    _true(f"{name}: top_k", 0 < router.top_k <= num, router.top_k, f"1 to {num}")
    _true(f"{name}: groups", groups > 0 and num % groups == 0, groups, f"a divisor of {num}")
    _true(f"{name}: top_groups", 0 < router.top_groups <= groups, router.top_groups,
          f"1 to {groups}")  # fmt: skip
    _matrix(f"{name}: router", weights.router, num, hidden, is_plain=True)
    _vector(f"{name}: router bias", weights.router_bias_E, num, is_optional=True)
    one = MlpSpec(intermediate=spec.intermediate, activation=spec.activation)
    for e, expert in enumerate(weights.experts):
        _mlp(f"{name}: expert {e}", hidden, one, expert)
        for part in ("gate_up", "down"):  # rows of all experts are made ready in one format
            found, first = (_grouping(getattr(x, part)) for x in (expert, weights.experts[0]))
            _equal(f"{name}: expert {e}: grouping of {part}", found, first)
    has_shared = spec.shared is not None
    _true(f"{name}: shared expert", has_shared == (weights.shared is not None),
          weights.shared is not None, has_shared)  # fmt: skip
    if spec.shared is not None and weights.shared is not None:
        _mlp(f"{name}: shared expert", hidden, spec.shared, weights.shared)
    if weights.shared_gate is not None:
        _matrix(f"{name}: shared gate", weights.shared_gate, 1, hidden, is_plain=True)


def _grouping(weight: PackedWeight) -> tuple[bool, int]:
    """Return what rows must agree on to be read by `weight`, beside their width."""
    return weight.format.is_quantized, weight.format.group


def _matrix(
    name: str, weight: PackedWeight | None, rows: int, columns: int, *, is_plain: bool = False
) -> None:
    """Check the shape [rows, columns] of a packed weight and the sizes of all it holds."""
    _true(name, isinstance(weight, PackedWeight), weight, f"a matrix [{rows}, {columns}]")
    assert weight is not None
    _equal(name, (weight.out_features, weight.in_features), (rows, columns))
    format, blocks = weight.format, -(-rows // LANES)
    _true(name, not (is_plain and format.is_quantized), format, "bf16 or f32")
    _true(f"{name}: group", format.group in (0, *GROUPS), format.group, GROUPS)
    size = blocks * LANES * weight.in_padded * format.bits // 8
    _tensor(f"{name}: data", weight.data, torch.uint8, (size,))
    if format.is_quantized:
        shape = (blocks, weight.in_padded // (format.group or weight.in_padded), LANES)
        _tensor(f"{name}: scales", weight.scales, torch.float16, shape)
        if weight.mins is not None:
            _tensor(f"{name}: minima", weight.mins, torch.float16, shape)
    if weight.bias is not None:
        _tensor(f"{name}: bias", weight.bias, torch.float32, (blocks * LANES,))


def _vector(name: str, found: Tensor | None, length: int, is_optional: bool = False) -> None:
    if found is not None or not is_optional:
        _tensor(name, found, torch.float32, (length,))


def _tensor(name: str, found: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    _true(name, found is not None, None, f"a tensor {list(shape)}")
    assert found is not None
    _equal(name, tuple(found.shape), shape)
    _equal(name, found.dtype, dtype)
    _true(name, found.is_contiguous(), found.stride(), "values in order")


def _equal(name: str, found: object, expected: object) -> None:
    _true(name, found == expected, found, expected)


def _true(name: str, is_so: bool, found: object, expected: object) -> None:
    if not is_so:
        raise UnsupportedError(f"{name} is {found}, the config needs {expected}", hint=_HINT)
