"""A decoder whose whole step is one native call. Implements `CausalLM` and `OwnsCache`.

Knows specs, packed weights and cache pages; knows nothing of requests. Start at
`NativeDecoder.forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mxn.errors import UnsupportedError
from mxn.kernels.native.library import library, use_threads
from mxn.kernels.native.memory import lazy_zeros
from mxn.kernels.native.pack import PackedWeight
from mxn.models.base import LayerCache
from mxn.models.native.check import check
from mxn.models.native.reader import NativeMla, NativeMoe, NativeReader
from mxn.models.spec import AttentionSpec, MlpSpec, MoeSpec

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.kernels.batch import StepBatch
    from mxn.kernels.native.formats import ModelFormat
    from mxn.models.checkpoint import Checkpoint
    from mxn.models.names import Names
    from mxn.models.native.predict import NativePrediction
    from mxn.models.spec import DecoderSpec, LayerSpec, RopeSpec
    from mxn.models.weights import GqaWeights, LayerWeights, MlpWeights, MtpWeights

LANES = 16
_QK_NORMS = {"none": 0, "head": 1, "full": 2}


def why_not(spec: DecoderSpec) -> str | None:
    """Return why native kernels cannot run `spec`, or None."""
    for layer in spec.layers:
        attention = layer.attention
        dims = (attention.mla.kv_lora_rank, attention.mla.rope_dim) if attention.mla else ()
        for dim in dims or (attention.head_dim,):
            if dim % 4:
                return f"a head of {dim} dims is no multiple of 4"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeParts:
    """All weights of a decoder, packed."""

    format: ModelFormat
    num_parameters: int
    table_VD: Tensor | None  # embedding; None: rows of the packed head
    head: PackedWeight
    layers: list[LayerWeights]
    final_norm: Tensor
    mtp: list[MtpWeights] = field(default_factory=list)  # prediction layers; head None: `head`


def read_parts(
    spec: DecoderSpec,
    names: Names,
    checkpoint: Checkpoint,
    format: ModelFormat,
    *,
    prediction: bool = False,
) -> NativeParts:
    """Read and pack all weights of `spec`; its prediction layers only if `prediction`.

    Raises: UnsupportedError for what cannot run.
    """
    refuse(spec)
    reader = NativeReader(spec, names, checkpoint, format)
    table, head = reader.packed_embedding()
    layers = [reader.layer(i) for i in range(len(spec.layers))]
    final_norm = reader.norm(names.final_norm)
    num_parameters = checkpoint.num_parameters  # the same whether or not guesses are wanted
    return NativeParts(
        format=format, num_parameters=num_parameters, table_VD=table, head=head, layers=layers,
        final_norm=final_norm, mtp=reader.mtp(None) if prediction else [],
    )  # fmt: skip


def refuse(spec: DecoderSpec) -> None:
    """Raises: UnsupportedError with the reason when native kernels cannot run `spec`."""
    reason = why_not(spec)
    if reason is not None:
        raise UnsupportedError(f"{spec.family} cannot run on native kernels: {reason}")


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of a native step, and what keeps their addresses alive."""

    batch: StepBatch
    cache: list[LayerCache]
    rows_R: Tensor
    logits_RV: Tensor
    addresses: np.ndarray  # of the layers' caches
    arguments: tuple[int, ...]


class NativeDecoder:
    """A decoder-only model on packed weights, computing in float32 and int8 on the processor."""

    def __init__(self, spec: DecoderSpec, parts: NativeParts, *, num_threads: int) -> None:
        refuse(spec)
        check(spec, parts)
        self.spec = spec
        self.parts = parts  # the native side has addresses of its memory
        self.format = parts.format
        self.vocab_size = spec.vocab_size
        self.max_positions = spec.max_positions
        self.kv_shapes = tuple(layer.attention.kv_shape for layer in spec.layers)
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self._lib = library()
        self.num_threads = num_threads
        self._pool = use_threads(num_threads)
        self._ropes = _Ropes(spec)
        self._caches: tuple[tuple[int, ...], np.ndarray] = ((), np.empty(0, dtype=np.uint64))
        self._logits_area = self._hidden_area = torch.empty(0)
        self._rows = torch.arange(64)
        self._call: _Call | None = None  # the last one: a step of decodes writes over its batch
        self._build()

    def _build(self) -> None:
        """Describe the model to the native side, which copies the descriptions."""
        self._native = self._lib.Decoder()
        self._prediction: NativePrediction | None = None
        self._pages = (0, 0)
        self._call = None
        parts = self.parts
        self._fill(parts.table_VD, parts.head, parts.final_norm)
        for layer, weights in zip(self.spec.layers, parts.layers, strict=True):
            self._native.add_layer(self._layer(layer, weights))

    def page_bytes(self, page_tokens: int) -> int:
        """Return the bytes of one page over all layers. Raises: UnsupportedError: not 16, 32, …"""
        return sum(self._cache_shape(layer, page_tokens).page_bytes for layer in self.spec.layers)

    def make_cache(self, num_pages: int, page_tokens: int) -> list[LayerCache]:
        """Return the zeroed cache of each layer: bytes in the layout of `csrc/common.h`.

        The shape [num_pages, bytes of a page] tells the size; a page is not in one piece.
        """
        caches = []
        for layer in self.spec.layers:
            size = self._cache_shape(layer, page_tokens).page_bytes
            caches.append(LayerCache(lazy_zeros(num_pages * size).view(num_pages, size), None))
        return caches

    def forward(self, batch: StepBatch, cache: list[LayerCache]) -> Tensor:
        """Write the step's keys and values into `cache` and return logits [R, V], float32.

        The result is overwritten by the next call: fresh memory for 32 rows of a large vocabulary
        would cost more page faults than a layer costs time.
        """
        call = self._call
        if call is None or call.batch is not batch or call.cache is not cache:
            call = self._call = self._prepare(batch, cache, 0, 0)
        self._grow_ropes(max(batch.attention.context_lens, default=1))
        self._native.forward(self._pool, *call.arguments)
        return call.logits_RV

    def forward_hidden(self, batch: StepBatch, cache: list[LayerCache]) -> tuple[Tensor, Tensor]:
        """Return what `forward` does, and the rows behind the final norm [T, D]; both as there."""
        hidden_TD = self._hidden(batch.token_ids_T.shape[0])
        return self._run(batch, cache, 0, hidden_TD.data_ptr()), hidden_TD

    @property
    def mtp(self) -> list[MtpWeights]:
        """The prediction layers that were read."""
        return self.parts.mtp

    @property
    def prediction(self) -> NativePrediction:
        """The first prediction layer, a decoder with a cache of its own; `mtp` says if it is."""
        if self._prediction is None:
            from mxn.models.native.predict import NativePrediction

            self._prediction = NativePrediction(self, self.parts.mtp[0])
        return self._prediction

    def predict_after_next(
        self, normed_TD: Tensor, batch: StepBatch, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """Run the prediction layer: see `Decoder.predict_after_next`. Results as in `forward`."""
        return self.prediction.predict(normed_TD, batch, cache)

    def _run(
        self, batch: StepBatch, cache: list[LayerCache], hidden_in: int, hidden_out: int
    ) -> Tensor:
        """Return logits [R, V]; rows behind the norm [T, D] are read and written where given."""
        call = self._prepare(batch, cache, hidden_in, hidden_out)
        self._grow_ropes(max(batch.attention.context_lens, default=1))
        self._native.forward(self._pool, *call.arguments)
        return call.logits_RV

    def _prepare(
        self, batch: StepBatch, cache: list[LayerCache], hidden_in: int, hidden_out: int
    ) -> _Call:
        """Return the arguments of the native call; they hold while the batch's memory stays."""
        attention = batch.attention
        pages = (attention.page_tokens, cache[0].k.shape[0])
        if pages != self._pages:
            self._set_pages(*pages)
        num_tokens = batch.token_ids_T.shape[0]  # `len` of a tensor takes ten times as long
        rows_R = batch.logits_rows_R
        if rows_R is None:
            rows_R = self._all_rows(num_tokens)
        num_rows = rows_R.shape[0]
        logits_RV, addresses = self._logits(num_rows), self._addresses(cache)
        pages_SP = attention.page_table_SP
        arguments = (
            num_tokens,
            attention.num_sequences,
            num_rows,
            pages_SP.shape[1],
            batch.token_ids_T.data_ptr(),
            batch.positions_T.data_ptr(),
            attention.query_starts_S1.data_ptr(),
            attention.context_lens_S.data_ptr(),
            pages_SP.data_ptr(),
            rows_R.data_ptr(),
            addresses.ctypes.data,
            logits_RV.data_ptr(),
            hidden_in,
            hidden_out,
        )
        return _Call(batch, cache, rows_R, logits_RV, addresses, arguments)

    def score_ranges(self, prompts: list[list[int]]) -> list[tuple[float, float, int]]:
        """Return (least, largest, rows) of the maxima of attention rows, layer by layer."""
        for i in range(len(self.spec.layers)):
            self._native.set_maximum(i, 0.0, 0.0)
        self._native.begin_calibration()
        for prompt in prompts:
            pages = -(-len(prompt) // LANES)
            self.forward(_one_prompt(prompt), self.make_cache(pages, LANES))
        found = list(self._native.ranges())
        self._native.end_calibration()
        return found

    def use_maxima(self, maxima: list[tuple[float, float]]) -> None:
        """Let each layer subtract (phi, margin) from its scores; margin 0: each row its own."""
        for i, (phi, margin) in enumerate(maxima):
            self._native.set_maximum(i, phi, margin)

    def linears(self) -> list[PackedWeight]:
        """Return one weight of each shape and format whose rows can be tiled: not of experts."""
        found: dict[tuple[Any, ...], PackedWeight] = {}
        for weight in packed_in(self.parts):
            found.setdefault((weight.format, weight.in_features, weight.out_features), weight)
        return list(found.values())

    def set_dataflow(self, tiled_from: dict[str, int], key: Callable[[PackedWeight], str]) -> None:
        """Tell each of those from how many rows on tiling pays; takes effect for new handles."""
        for weight in packed_in(self.parts):
            weight.handle.tiled_from = tiled_from.get(key(weight), weight.handle.tiled_from)
        self._build()

    @property
    def num_recomputed(self) -> int:
        """Query rows of attention whose maximum left the calibrated range, since the start."""
        return self._native.num_recomputed

    def _all_rows(self, num_tokens: int) -> Tensor:
        if num_tokens > self._rows.shape[0]:
            self._rows = torch.arange(2 * num_tokens)
        return self._rows[:num_tokens]

    def _logits(self, num_rows: int) -> Tensor:
        if num_rows * self.vocab_size > self._logits_area.numel():
            self._logits_area = lazy_zeros(4 * num_rows * self.vocab_size).view(torch.float32)
        return self._logits_area[: num_rows * self.vocab_size].view(num_rows, self.vocab_size)

    def _hidden(self, num_tokens: int) -> Tensor:
        size = num_tokens * self.spec.hidden
        if size > self._hidden_area.numel():
            self._hidden_area = torch.empty(size)
        return self._hidden_area[:size].view(num_tokens, self.spec.hidden)

    def _addresses(self, cache: list[LayerCache]) -> np.ndarray:
        """Return the layers' addresses.

        Every address is compared: another cache may begin where one that was freed began.
        """
        key = tuple(part.k.data_ptr() for part in cache)
        if self._caches[0] != key:
            self._caches = (key, np.array(key, dtype=np.uint64))
        return self._caches[1]

    def _fill(self, table_VD: Tensor | None, head: PackedWeight, final_norm: Tensor) -> None:
        native, spec, lib = self._native, self.spec, self._lib
        native.hidden, native.vocab, native.eps = spec.hidden, spec.vocab_size, spec.norm_eps
        native.embedding_scale = spec.embedding_scale
        native.logit_scale = spec.logit_scale
        native.logit_softcap = spec.logit_softcap or 0.0
        native.act_group = self.format.act_group
        native.final_norm = final_norm.data_ptr()
        native.head = head.handle
        native.is_table = table_VD is not None
        if table_VD is None:
            native.embedding = head.handle
        else:
            table = lib.Weight()
            is_bf16 = table_VD.dtype == torch.bfloat16
            table.format = lib.Format.bf16 if is_bf16 else lib.Format.f32
            table.n, table.k = table_VD.shape
            table.data = table_VD.data_ptr()
            native.embedding = table
        for rope in self._ropes.handles(lib):
            native.add_rope(rope)

    def _layer(self, spec: LayerSpec, weights: LayerWeights) -> Any:
        layer = self._lib.Layer()
        for name, part in (
            ("pre_attn", weights.pre_attn_norm),
            ("post_attn", weights.post_attn_norm),
            ("pre_ffn", weights.pre_ffn_norm),
            ("post_ffn", weights.post_ffn_norm),
        ):
            if part is not None:
                setattr(layer, name, part.data_ptr())
        layer.residual_scale = spec.residual_scale
        layer.attention = self._attention(spec.attention, weights.attention)
        layer.cache = self._cache_shape(spec, LANES)
        if isinstance(spec.ffn, MoeSpec):
            layer.is_moe = True
            layer.moe = self._moe(spec.ffn, weights.ffn)
        else:
            layer.mlp = self._mlp(spec.ffn, weights.ffn)
        return layer

    def _attention(self, spec: AttentionSpec, weights: GqaWeights | NativeMla) -> Any:
        found = self._lib.Attention()
        found.heads, found.kv_heads = spec.num_heads, spec.num_kv_heads
        found.head_dim, found.scale = spec.head_dim, spec.scale
        found.softcap, found.window = spec.softcap or 0.0, spec.window or 0
        found.rope = self._ropes.index(spec.rope)
        found.out = weights.out.handle
        if isinstance(weights, NativeMla):
            self._fill_mla(found, spec, weights)
            return found
        found.qkv = weights.qkv.handle
        found.qk_norm = _QK_NORMS[spec.qk_norm]
        if weights.q_norm is not None and weights.k_norm is not None:
            found.q_norm, found.k_norm = weights.q_norm.data_ptr(), weights.k_norm.data_ptr()
        return found

    def _fill_mla(self, found: Any, spec: AttentionSpec, weights: NativeMla) -> None:
        mla = spec.mla
        assert mla is not None
        found.is_mla, found.has_q_lora = True, weights.q is None
        found.nope_dim, found.rope_dim, found.v_dim = mla.nope_dim, mla.rope_dim, mla.v_dim
        found.latent, found.latent_eps = mla.kv_lora_rank, mla.norm_eps
        found.kv_a, found.kv_a_norm = weights.kv_a.handle, weights.kv_a_norm.data_ptr()
        if weights.q is not None:
            found.q = weights.q.handle
        else:
            assert weights.q_a is not None
            assert weights.q_b is not None
            assert weights.q_a_norm is not None
            found.q_a, found.q_b = weights.q_a.handle, weights.q_b.handle
            found.q_a_norm = weights.q_a_norm.data_ptr()
            found.q_rank = mla.q_lora_rank
        for key_up, value_up in zip(weights.key_up, weights.value_up, strict=True):
            found.add_head(key_up.handle, value_up.handle)

    def _mlp(self, spec: MlpSpec, weights: MlpWeights) -> Any:
        mlp = self._lib.Mlp()
        mlp.intermediate = spec.intermediate
        mlp.act = getattr(self._lib.Act, spec.activation)
        mlp.is_gated = spec.is_gated
        mlp.up, mlp.down = weights.gate_up.handle, weights.down.handle
        return mlp

    def _moe(self, spec: MoeSpec, weights: NativeMoe) -> Any:
        moe, router = self._lib.Moe(), spec.router
        moe.num_experts, moe.top_k = router.num_experts, router.top_k
        moe.num_groups, moe.top_groups = router.num_groups, router.top_groups
        moe.is_sigmoid = router.scoring == "sigmoid"
        moe.is_normalized, moe.scale = router.normalize, router.scale
        moe.is_top2_sum = router.group_score == "top2_sum"
        moe.router = weights.router.handle
        if weights.router_bias_E is not None:
            moe.bias = weights.router_bias_E.data_ptr()
        one = MlpSpec(intermediate=spec.intermediate, activation=spec.activation)
        for expert in weights.experts:
            moe.add_expert(self._mlp(one, expert))
        if weights.shared is not None and spec.shared is not None:
            moe.has_shared, moe.shared = True, self._mlp(spec.shared, weights.shared)
        if weights.shared_gate is not None:
            moe.has_shared_gate, moe.shared_gate = True, weights.shared_gate.handle
        return moe

    def _cache_shape(self, layer: LayerSpec, page_tokens: int) -> Any:
        if page_tokens % LANES:
            raise UnsupportedError(
                f"native kernels need pages of a multiple of {LANES} tokens, not {page_tokens}",
                hint=f"page_tokens={LANES}",
            )
        shape, kv = self._lib.CacheShape(), layer.attention.kv_shape
        types = self._lib.CacheType
        shape.type = {"f32": types.f32, "bf16": types.bf16, "int8": types.i8}[self.format.cache]
        shape.heads, shape.k_dim, shape.v_dim = kv.num_heads, kv.k_dim, kv.v_dim
        shape.latent = layer.attention.mla.kv_lora_rank if layer.attention.mla else 0
        shape.page_tokens = page_tokens
        return shape

    def _set_pages(self, page_tokens: int, num_pages: int) -> None:
        self._cache_shape(self.spec.layers[0], page_tokens)
        self._native.set_pages(page_tokens, num_pages)
        self._pages = (page_tokens, num_pages)

    def _grow_ropes(self, length: int) -> None:
        if self._ropes.grow(length):
            for i, rope in enumerate(self._ropes.handles(self._lib)):
                self._native.set_rope(i, rope)


def packed_in(part: Any) -> Iterator[PackedWeight]:
    """Yield every packed weight of nested parts but experts, which are multiplied together."""
    if isinstance(part, PackedWeight):
        yield part
    elif isinstance(part, list | tuple):
        for item in part:
            yield from packed_in(item)
    elif is_dataclass(part) and not isinstance(part, type):
        for entry in fields(part):
            if not (isinstance(part, NativeMoe) and entry.name == "experts"):
                yield from packed_in(getattr(part, entry.name))


def _one_prompt(token_ids: list[int]) -> StepBatch:
    """Return the step that computes a prompt from its start, over pages 0, 1, 2, …"""
    from mxn.kernels.batch import AttentionBatch, StepBatch

    count = len(token_ids)
    pages = -(-count // LANES)
    attention = AttentionBatch(
        query_starts=[0, count],
        context_lens=[count],
        page_table_SP=torch.arange(pages).unsqueeze(0),
        context_lens_S=torch.tensor([count]),
        query_starts_S1=torch.tensor([0, count]),
        slots_T=torch.arange(count),
        page_tokens=LANES,
    )
    last = torch.tensor([count - 1])
    return StepBatch(torch.tensor(token_ids), torch.arange(count), attention, last)


class _Ropes:
    """cos and sin of every rotary embedding of a model, grown on demand by doubling."""

    def __init__(self, spec: DecoderSpec) -> None:
        found = {layer.attention.rope for layer in spec.layers} - {None}
        self._specs: list[RopeSpec] = [rope for rope in found if rope is not None]
        self._limit = spec.max_positions
        self._length = 0
        self._tables: list[tuple[Tensor, Tensor]] = []
        self.grow(min(self._limit, 4096))

    def index(self, rope: RopeSpec | None) -> int:
        return -1 if rope is None else self._specs.index(rope)

    def grow(self, length: int) -> bool:
        """Hold at least `length` positions; return whether the tables moved."""
        if length <= self._length:
            return False
        self._length = max(length, min(self._limit, 2 * self._length))
        positions = torch.arange(self._length, dtype=torch.float32)
        self._tables = []
        for rope in self._specs:
            angles = torch.outer(positions, torch.tensor(rope.inv_freq, dtype=torch.float32))
            self._tables.append((angles.cos() * rope.scale, angles.sin() * rope.scale))
        return True

    def handles(self, lib: Any) -> list[Any]:
        made = []
        for rope, (cos, sin) in zip(self._specs, self._tables, strict=True):
            handle = lib.Rope()
            handle.half, handle.is_interleaved = len(rope.inv_freq), rope.is_interleaved
            handle.cos, handle.sin = cos.data_ptr(), sin.data_ptr()
            made.append(handle)
        return made
