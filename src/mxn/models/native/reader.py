"""Reads a checkpoint into packed weights: each matrix is packed as soon as it is read.

Knows names and formats; knows nothing of steps. See `mxn.models.weights` for the plain twin.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mxn.kernels.native.formats import BF16, F32, ModelFormat, WeightFormat
from mxn.kernels.native.pack import LANES, PackedWeight, glu_order, pack, pack_glu, taken
from mxn.models.native.stored import can_pack, can_pack_mixed, pack_mixed, pack_stored
from mxn.models.quantized.matrix import QuantizedMatrix
from mxn.models.spec import AttentionSpec, MlpSpec, MoeSpec
from mxn.models.weights import MlpWeights, WeightReader

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.models.checkpoint import Checkpoint
    from mxn.models.names import Names
    from mxn.models.spec import DecoderSpec


@dataclass(slots=True)
class PackingOps:
    """What `WeightReader` asks of the operators: where tensors go, and how a linear is kept."""

    wanted: WeightFormat
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def prepare_linear(self, weight_FD: Tensor, bias_F: Tensor | None = None) -> PackedWeight:
        return pack(weight_FD, self.wanted, bias_F)


@dataclass(slots=True)
class NativeMla:
    q: PackedWeight | None
    q_a: PackedWeight | None
    q_a_norm: Tensor | None
    q_b: PackedWeight | None
    kv_a: PackedWeight
    kv_a_norm: Tensor
    key_up: list[PackedWeight]  # a matrix for each head
    value_up: list[PackedWeight]
    out: PackedWeight


@dataclass(slots=True)
class NativeMoe:
    router: PackedWeight
    router_bias_E: Tensor | None
    experts: list[MlpWeights]
    shared: MlpWeights | None
    shared_gate: PackedWeight | None


def _are_kept(parts: list[QuantizedMatrix], wanted: WeightFormat) -> bool:
    """Whether parts join without another rounding to a matrix of no more bits than `wanted`."""
    if not QuantizedMatrix.can_cat(parts) or max(part.bits for part in parts) > wanted.bits:
        return False
    return can_pack(QuantizedMatrix.cat(parts))


class NativeReader(WeightReader):
    """A `WeightReader` whose linears are packed."""

    def __init__(
        self, spec: DecoderSpec, names: Names, checkpoint: Checkpoint, format: ModelFormat
    ) -> None:
        super().__init__(spec, names, checkpoint, PackingOps(format.weights))  # type: ignore[arg-type]
        self.format = format
        self._keeps_stored = True  # weights that their maker quantized, as they are

    def packed_embedding(self) -> tuple[Tensor | None, PackedWeight]:
        """Return the embedding table, None when it is tied to the packed head, and the head."""
        table = self.checkpoint.read(f"{self.names.embedding}.weight")
        has_own = not self.spec.is_tied or self._has_own_head(table.float())
        stored = self._parts(
            (self.names.head if has_own else self.names.embedding,), self.format.head
        )
        if stored is not None:
            head = pack_stored(stored[0])
            if not has_own:
                self.checkpoint.num_parameters -= table.numel()  # the head is the table, read again
        elif has_own:
            head = pack(*self._plain(self.names.head), self.format.head)
        else:
            head = pack(table.float(), self.format.head)
        keeps_table = has_own or not self.format.head.is_quantized
        if not keeps_table:
            return None, head
        is_small = self.format.weights.bits <= 16
        dtype = torch.bfloat16 if is_small else torch.float32
        return table.to(dtype).contiguous(), head

    def _mtp_head(self, prefix: str, embedding_head: Any) -> PackedWeight | None:
        """Published checkpoints repeat the model's head here: None stands for that one."""
        own = prefix + self.names.mtp_head
        if f"{own}.weight" not in self.checkpoint or self._is_copy(own, self.names.head):
            return None
        return pack(*self._plain(own), self.format.head)

    def _is_copy(self, module: str, of: str) -> bool:
        name, other = f"{module}.weight", f"{of}.weight"
        if other not in self.checkpoint:
            return False
        return torch.equal(self.checkpoint.read(name), self.checkpoint.read(other))

    def _plain(self, module: str) -> tuple[Tensor]:
        return (self.tensor(f"{module}.weight"),)

    def norm(self, module: str) -> Tensor:
        return super().norm(module).float().contiguous()

    def linear(self, *modules: str) -> PackedWeight:
        parts = self._parts(modules, self.format.weights, can_mix=True)
        if parts is None:
            return super().linear(*modules)
        bias = self._bias(modules, [part.shape[0] for part in parts])
        if _are_kept(parts, self.format.weights):
            return pack_stored(QuantizedMatrix.cat(parts), bias)
        return pack_mixed(parts, self.format.weights.bits, bias)

    def _parts(
        self, modules: tuple[str, ...], wanted: WeightFormat, *, can_mix: bool = False
    ) -> list[QuantizedMatrix] | None:
        """Return modules as their maker quantized them, if joined they are no finer than `wanted`.

        With `can_mix` also where some of them are finer, and `pack_mixed` can join them. Rounding
        numbers that were rounded before loses twice and gains nothing.
        """
        if not wanted.is_quantized or not self._keeps_stored:
            return None
        if any(not self.checkpoint.is_quantized(module) for module in modules):
            return None
        found = [self.checkpoint.quantized(module) for module in modules]
        parts = [part for part in found if part is not None]
        if _are_kept(parts, wanted) or (can_mix and can_pack_mixed(parts, wanted.bits)):
            return parts
        self.checkpoint.num_parameters -= sum(part.values.numel() for part in parts)  # read again
        return None

    def _bias(self, modules: tuple[str, ...], sizes: list[int]) -> Tensor | None:
        """Return the biases of modules of that many rows, padded to whole blocks; None: no bias."""
        names = [f"{module}.bias" for module in modules]
        if not any(name in self.checkpoint for name in names):
            return None
        parts = [
            self.tensor(name) if name in self.checkpoint else torch.zeros(size)
            for name, size in zip(names, sizes, strict=True)
        ]
        bias = torch.zeros(-(-sum(sizes) // LANES) * LANES)
        bias[: sum(sizes)] = torch.cat(parts)
        return bias

    def _ffn(self, spec: MlpSpec | MoeSpec, prefix: str) -> Any:
        if isinstance(spec, MoeSpec):
            return self._native_moe(spec, prefix)
        names = self.names
        return self._mlp(spec, tuple(prefix + name for name in names.gate_up), prefix + names.down)

    def _mlp(self, spec: MlpSpec, gate_up: tuple[str, ...], down: str) -> MlpWeights:
        parts = self._parts(gate_up, self.format.weights) if spec.is_gated else None
        if parts is not None:
            stored = QuantizedMatrix.cat(parts)
            order = glu_order(stored.shape[0] // 2)
            bias = self._bias(gate_up, [part.shape[0] for part in parts])
            up = pack_stored(stored, None if bias is None else taken(bias, order), order)
            return MlpWeights(gate_up=up, down=self.linear(down))
        weight, bias = self.matrix(gate_up)
        if spec.is_gated:
            up = pack_glu(weight, self.format.weights, bias)
        else:
            up = pack(weight, self.format.weights, bias)
        return MlpWeights(gate_up=up, down=self.linear(down))

    def _native_moe(self, spec: MoeSpec, prefix: str) -> NativeMoe:
        names, bias = self.names, prefix + self.names.router_bias
        has_bias = spec.router.scoring == "sigmoid" or bias in self.checkpoint
        experts = self._native_experts(spec, prefix)
        gates = tuple(prefix + name for name in names.shared_gate_up)
        shared = self._mlp(spec.shared, gates, prefix + names.shared_down) if spec.shared else None
        gate = f"{prefix}{names.shared_gate}.weight"
        return NativeMoe(
            router=pack(self.tensor(f"{prefix}{names.router}.weight"), F32),
            router_bias_E=self.tensor(bias).contiguous() if has_bias else None,
            experts=experts,
            shared=shared,
            shared_gate=pack(self.tensor(gate), F32) if spec.has_shared_gate else None,
        )

    def _native_experts(self, spec: MoeSpec, prefix: str) -> list[MlpWeights]:
        """Return the experts, all in one grouping: a step makes the rows of all ready at once.

        Where a checkpoint has only some of them quantized, none is kept as its maker stored it.
        """
        names, before = self.names, self.checkpoint.num_parameters
        one = MlpSpec(intermediate=spec.intermediate, activation=spec.activation)
        ways = [
            (tuple(prefix + name.format(e=e) for name in names.expert_gate_up),
             prefix + names.expert_down.format(e=e))
            for e in range(spec.router.num_experts)
        ]  # fmt: skip
        experts = [self._mlp(one, *way) for way in ways]
        formats = {(expert.gate_up.format.group, expert.down.format.group) for expert in experts}
        if len(formats) > 1:
            self.checkpoint.num_parameters, self._keeps_stored = before, False
            experts = [self._mlp(one, *way) for way in ways]
            self._keeps_stored = True
        return experts

    def _mla(self, spec: AttentionSpec, prefix: str) -> Any:
        assert spec.mla is not None
        mla, names = spec.mla, self.names
        is_compressed = mla.q_lora_rank is not None
        up = self.tensor(f"{prefix}{names.mla_kv_b}.weight")
        up_NCL = up.view(spec.num_heads, mla.nope_dim + mla.v_dim, mla.kv_lora_rank)
        heads = F32 if self.format.weights.bits == 32 else BF16
        return NativeMla(
            q=None if is_compressed else self.linear(prefix + names.mla_q),
            q_a=self.linear(prefix + names.mla_q_a) if is_compressed else None,
            q_a_norm=self.norm(prefix + names.mla_q_a_norm) if is_compressed else None,
            q_b=self.linear(prefix + names.mla_q_b) if is_compressed else None,
            kv_a=self.linear(prefix + names.mla_kv_a),
            kv_a_norm=self.norm(prefix + names.mla_kv_a_norm),
            key_up=[pack(part[: mla.nope_dim].t(), heads) for part in up_NCL],
            value_up=[pack(part[mla.nope_dim :], heads) for part in up_NCL],
            out=self.linear(prefix + names.attn_out),
        )
