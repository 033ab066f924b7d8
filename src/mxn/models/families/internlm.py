"""InternLM 1 and 3 (Llama with biases) and InternLM 2 (fused, grouped query-key-value weights).

Their code lives with their checkpoints; mxn reads the weights and never runs that code.
"""

from __future__ import annotations

from mxn.models.families import Family
from mxn.models.families.llama import llama_like
from mxn.models.names import Names

FAMILIES = (
    Family(
        "internlm",
        ("InternLMForCausalLM", "InternLM3ForCausalLM"),
        lambda config: llama_like(config, "internlm"),
    ),
    Family(
        "internlm2",
        ("InternLM2ForCausalLM",),
        lambda config: llama_like(config, "internlm2"),
        Names(
            embedding="model.tok_embeddings",
            head="output",
            pre_attn_norm="attention_norm",
            pre_ffn_norm="ffn_norm",
            qkv=("attention.wqkv",),
            qkv_layout="grouped",
            attn_out="attention.wo",
            gate_up=("feed_forward.w1", "feed_forward.w3"),
            down="feed_forward.w2",
        ),
    ),
)
