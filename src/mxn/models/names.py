"""Where a family keeps each weight in its checkpoint.

A part is a tuple of module names joined on the output dim (one name: stored fused). ``{e}``
stands for the expert number. The defaults are Llama's; a family states what differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{i}."

    pre_attn_norm: str = "input_layernorm"
    post_attn_norm: str = ""
    pre_ffn_norm: str = "post_attention_layernorm"
    post_ffn_norm: str = ""

    qkv: Part = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    # "grouped": for each key/value head its queries, then its key and its value (InternLM2)
    qkv_layout: Literal["flat", "grouped"] = "flat"
    attn_out: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"

    mla_q: str = "self_attn.q_proj"
    mla_q_a: str = "self_attn.q_a_proj"
    mla_q_a_norm: str = "self_attn.q_a_layernorm"
    mla_q_b: str = "self_attn.q_b_proj"
    mla_kv_a: str = "self_attn.kv_a_proj_with_mqa"
    mla_kv_a_norm: str = "self_attn.kv_a_layernorm"
    mla_kv_b: str = "self_attn.kv_b_proj"

    gate_up: Part = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"

    router: str = "mlp.gate"
    router_bias: str = "mlp.gate.e_score_correction_bias"
    expert_gate_up: Part = ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj")
    expert_down: str = "mlp.experts.{e}.down_proj"
    shared_gate_up: Part = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
    shared_down: str = "mlp.shared_experts.down_proj"
    shared_gate: str = "mlp.shared_expert_gate"

    # Multi-token-prediction layer: norms of hidden state and next token, and their merge.
    mtp_hidden_norm: str = "hnorm"
    mtp_token_norm: str = "enorm"
    mtp_merge: str = "eh_proj"
    mtp_final_norm: str = "shared_head.norm"
    mtp_head: str = "shared_head.head"
