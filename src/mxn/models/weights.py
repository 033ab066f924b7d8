"""From the tensors of a checkpoint to the parts a decoder runs: fused, cast, on the device.

Knows names and layouts; knows nothing of steps, caches or requests.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mxn.models.names import Names, Part
from mxn.models.spec import AttentionSpec, DecoderSpec, MlpSpec, MoeSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mxn.kernels.registry import Ops
    from mxn.models.checkpoint import Checkpoint
    from mxn.models.quantized.matrix import QuantizedMatrix

log = logging.getLogger("mxn.models")


@dataclass(slots=True)
class PerHead:
    """x [T, N, I] -> y [T, N, O]: a matrix of its own for each head."""

    weight_NIO: Tensor

    def __call__(self, x_TNI: Tensor) -> Tensor:
        return x_TNI.transpose(0, 1).bmm(self.weight_NIO).transpose(0, 1)


@dataclass(slots=True)
class GqaWeights:
    qkv: Any  # Linear [D -> N*H + 2*G*H]
    out: Any  # Linear [N*H -> D]
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(slots=True)
class MlaWeights:
    q: Any | None  # Linear [D -> N*(nope + rope)], without query compression
    q_a: Any | None
    q_a_norm: Tensor | None
    q_b: Any | None
    kv_a: Any  # Linear [D -> L + rope]
    kv_a_norm: Tensor
    # The up-projection of the latent, split and kept per head, so that attention runs on latents.
    key_up: Any  # PerHead [N, P -> L]
    value_up: Any  # PerHead [N, L -> J]
    out: Any


@dataclass(slots=True)
class MlpWeights:
    gate_up: Any
    down: Any


@dataclass(slots=True)
class MoeWeights:
    router_ED: Tensor  # float32: routing decides in full precision
    router_bias_E: Tensor | None
    gate_up_EFD: Tensor
    down_EDI: Tensor
    shared: MlpWeights | None
    shared_gate_1D: Tensor | None


@dataclass(slots=True)
class LayerWeights:
    attention: GqaWeights | MlaWeights
    ffn: MlpWeights | MoeWeights
    pre_attn_norm: Tensor | None
    post_attn_norm: Tensor | None
    pre_ffn_norm: Tensor | None
    post_ffn_norm: Tensor | None


@dataclass(slots=True)
class MtpWeights:
    """A multi-token-prediction layer: it guesses the token after the next one."""

    hidden_norm: Tensor
    token_norm: Tensor
    merge: Any  # Linear [2D -> D]
    layer: LayerWeights
    final_norm: Tensor
    head: Any


class WeightReader:
    """Reads the parts of one model. Each method names what it returns."""

    def __init__(self, spec: DecoderSpec, names: Names, checkpoint: Checkpoint, ops: Ops) -> None:
        self.spec = spec
        self.names = names
        self.checkpoint = checkpoint
        self.ops = ops

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        raw = self.checkpoint.read(name)
        return raw.to(device=self.ops.device, dtype=dtype or self.ops.dtype)

    def quantized(self, module: str) -> QuantizedMatrix | None:
        """The weight of `module` as its maker quantized it; None when it is stored plainly."""
        return self.checkpoint.quantized(module)

    def norm(self, module: str) -> Tensor:
        """A norm weight; Gemma's are stored minus one and need float32 to keep their meaning."""
        import torch

        if self.spec.is_norm_offset:
            return self.tensor(f"{module}.weight", torch.float32) + 1.0
        return self.tensor(f"{module}.weight")

    def matrix(self, modules: Part) -> tuple[Tensor, Tensor | None]:
        """Weights (and biases, if any part has one) of modules joined on the output dim."""
        import torch

        weights = [self.tensor(f"{module}.weight") for module in modules]
        has_bias = [f"{module}.bias" in self.checkpoint for module in modules]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        if not any(has_bias):
            return weight, None
        biases = [
            self.tensor(f"{module}.bias") if has else part.new_zeros(part.shape[0])
            for module, has, part in zip(modules, has_bias, weights, strict=True)
        ]
        return weight, torch.cat(biases)

    def linear(self, *modules: str) -> Any:
        return self.ops.prepare_linear(*self.matrix(modules))

    def embedding(self) -> Tensor:
        return self.tensor(f"{self.names.embedding}.weight")

    def head(self, embedding: Tensor) -> Any:
        if self.spec.is_tied and not self._has_own_head(embedding):
            return self.ops.prepare_linear(embedding)
        return self.linear(self.names.head)

    def _has_own_head(self, embedding: Tensor) -> bool:
        """Whether the checkpoint holds a head of other numbers, though its config says tied.

        Then the config is wrong, not the weights (a fine-tuned head); transformers agrees.
        """
        import torch

        name = f"{self.names.head}.weight"
        if name not in self.checkpoint:
            return False
        stored = self.tensor(name)
        self.checkpoint.num_parameters -= stored.numel()  # counted when it is used
        if stored.shape == embedding.shape and torch.equal(stored, embedding):
            return False
        log.warning("config.json says tied embeddings, but %s differs: it is used", name)
        return True

    def layer(self, index: int) -> LayerWeights:
        spec = self.spec.layers[min(index, len(self.spec.layers) - 1)]
        prefix = self.names.layer.format(i=index)
        names = self.names
        pre, post = spec.has_pre_norm, spec.has_post_norm
        return LayerWeights(
            attention=self._attention(spec.attention, prefix),
            ffn=self._ffn(spec.ffn, prefix),
            pre_attn_norm=self.norm(prefix + names.pre_attn_norm) if pre else None,
            post_attn_norm=self.norm(prefix + names.post_attn_norm) if post else None,
            pre_ffn_norm=self.norm(prefix + names.pre_ffn_norm) if pre else None,
            post_ffn_norm=self.norm(prefix + names.post_ffn_norm) if post else None,
        )

    def _attention(self, spec: AttentionSpec, prefix: str) -> GqaWeights | MlaWeights:
        if spec.mla:
            return self._mla(spec, prefix)
        names = self.names
        modules = tuple(prefix + name for name in names.qkv)
        if names.qkv_layout == "grouped":
            weight, bias = self.matrix(modules)
            bias = None if bias is None else ungroup_qkv(bias, spec)
            qkv = self.ops.prepare_linear(ungroup_qkv(weight, spec), bias)
        else:
            qkv = self.linear(*modules)
        has_norm = spec.qk_norm != "none"
        return GqaWeights(
            qkv=qkv,
            out=self.linear(prefix + names.attn_out),
            q_norm=self.norm(prefix + names.q_norm) if has_norm else None,
            k_norm=self.norm(prefix + names.k_norm) if has_norm else None,
        )

    def _mla(self, spec: AttentionSpec, prefix: str) -> MlaWeights:
        assert spec.mla is not None
        mla, names = spec.mla, self.names
        is_compressed = mla.q_lora_rank is not None
        up = self.tensor(f"{prefix}{names.mla_kv_b}.weight")
        up_NCL = up.view(spec.num_heads, mla.nope_dim + mla.v_dim, mla.kv_lora_rank)
        return MlaWeights(
            q=None if is_compressed else self.linear(prefix + names.mla_q),
            q_a=self.linear(prefix + names.mla_q_a) if is_compressed else None,
            q_a_norm=self.norm(prefix + names.mla_q_a_norm) if is_compressed else None,
            q_b=self.linear(prefix + names.mla_q_b) if is_compressed else None,
            kv_a=self.linear(prefix + names.mla_kv_a),
            kv_a_norm=self.norm(prefix + names.mla_kv_a_norm),
            key_up=PerHead(up_NCL[:, : mla.nope_dim].contiguous()),
            value_up=PerHead(up_NCL[:, mla.nope_dim :].transpose(1, 2).contiguous()),
            out=self.linear(prefix + names.attn_out),
        )

    def _ffn(self, spec: MlpSpec | MoeSpec, prefix: str) -> MlpWeights | MoeWeights:
        names = self.names
        if isinstance(spec, MlpSpec):
            return MlpWeights(
                gate_up=self.linear(*(prefix + name for name in names.gate_up)),
                down=self.linear(prefix + names.down),
            )
        return self._moe(spec, prefix)

    def _moe(self, spec: MoeSpec, prefix: str) -> MoeWeights:
        import torch

        names, bias = self.names, prefix + self.names.router_bias
        # A sigmoid router chooses with its learned bias: without it, it would choose others.
        has_bias = spec.router.scoring == "sigmoid" or bias in self.checkpoint
        gate_up, down = self._experts(spec, prefix)
        return MoeWeights(
            router_ED=self.tensor(f"{prefix}{names.router}.weight", torch.float32),
            router_bias_E=self.tensor(bias, torch.float32) if has_bias else None,
            gate_up_EFD=gate_up,
            down_EDI=down,
            shared=MlpWeights(
                gate_up=self.linear(*(prefix + name for name in names.shared_gate_up)),
                down=self.linear(prefix + names.shared_down),
            )
            if spec.shared
            else None,
            shared_gate_1D=self.tensor(f"{prefix}{names.shared_gate}.weight")
            if spec.has_shared_gate
            else None,
        )

    def _experts(self, spec: MoeSpec, prefix: str) -> tuple[Tensor, Tensor]:
        """Stack the experts into two tensors, filled one expert at a time to keep the peak low."""
        import torch

        count, hidden, width = spec.router.num_experts, self.spec.hidden, spec.intermediate
        options = {"dtype": self.ops.dtype, "device": self.ops.device}
        gate_up = torch.empty(count, 2 * width, hidden, **options)
        down = torch.empty(count, hidden, width, **options)
        for e in range(count):
            gate, up = (prefix + name.format(e=e) for name in self.names.expert_gate_up)
            gate_up[e, :width] = self.tensor(f"{gate}.weight")
            gate_up[e, width:] = self.tensor(f"{up}.weight")
            down[e] = self.tensor(f"{prefix}{self.names.expert_down.format(e=e)}.weight")
        return gate_up, down

    def mtp(self, embedding_head: Any) -> list[MtpWeights]:
        """Return the multi-token-prediction layers that the checkpoint holds.

        `num_nextn_predict_layers` describes the published training run; a checkpoint may have been
        exported without these layers, as `transformers` does.
        """
        first = len(self.spec.layers)
        found = []
        for index in range(first, first + self.spec.num_mtp_layers):
            prefix = self.names.layer.format(i=index)
            if f"{prefix}{self.names.mtp_merge}.weight" in self.checkpoint:
                found.append(self._mtp_layer(index, prefix, embedding_head))
        return found

    def _mtp_layer(self, index: int, prefix: str, embedding_head: Any) -> MtpWeights:
        names = self.names
        return MtpWeights(
            hidden_norm=self.norm(prefix + names.mtp_hidden_norm),
            token_norm=self.norm(prefix + names.mtp_token_norm),
            merge=self.linear(prefix + names.mtp_merge),
            layer=self.layer(index),
            final_norm=self.norm(prefix + names.mtp_final_norm),
            head=self._mtp_head(prefix, embedding_head),
        )

    def _mtp_head(self, prefix: str, embedding_head: Any) -> Any:
        name = prefix + self.names.mtp_head
        return self.linear(name) if f"{name}.weight" in self.checkpoint else embedding_head


def ungroup_qkv(weight: Tensor, spec: AttentionSpec) -> Tensor:
    """Return [all q, all k, all v] rows from rows stored per key/value head as (q…, k, v).

    Shapes: weight [(N + 2G) * H, …] in and out.
    """
    import torch

    heads, groups, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    tail = weight.shape[1:]
    grouped = weight.view(groups, heads // groups + 2, dim, *tail)
    queries = grouped[:, :-2].reshape(heads * dim, *tail)
    keys = grouped[:, -2].reshape(groups * dim, *tail)
    values = grouped[:, -1].reshape(groups * dim, *tail)
    return torch.cat((queries, keys, values))
