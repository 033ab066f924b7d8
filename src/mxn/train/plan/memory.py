"""Bytes that a stage takes on each of its devices. Start at `stage_parts`.

Counts weights, gradients, optimizer state, kept activations and what the framework takes. Does not
know allocators: fragmentation belongs into `MemoryModel.headroom`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mxn.train.plan.plan import Recompute, Schedule
from mxn.train.plan.shape import LayerShape

# Korthikanti et al. 2022, eq. 2: without the attention scores a block keeps 34 bytes per hidden
# value in 16 bit, which is 17 times its output.
_KEPT_PER_OUTPUT = 17.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """Bytes per parameter and per activation. The default is mixed bf16 training with Adam."""

    weight_bytes: float = 2.0
    grad_bytes: float = 2.0
    optimizer_bytes: float = 12.0  # float32 weights and both moments; all that ZeRO-1 shares out
    reduce_bytes: float = 2.0  # of a gradient value on the wire between pipelines
    saved_bytes: float = 0.0  # as `optimizer_bytes`: what a save copies, if to the device's memory
    trainable_share: float = 1.0  # of the parameters; small for LoRA
    headroom: float = 0.0  # share on top of everything but the framework, for fragmentation
    # What a micro-batch in flight brings in and hands on: the share that is kept beside what
    # backward saves. With full recomputation what comes in is saved anyway.
    inputs_kept: float = 0.0
    outputs_kept: float = 0.0
    messages: int = 0  # buffers for activations and gradients on their way
    shares_layers: bool = False  # ZeRO-1 gives away whole layers; else equal parts

    @property
    def state_bytes(self) -> float:
        """Per parameter with nothing shared out."""
        trained = self.grad_bytes + self.optimizer_bytes + self.saved_bytes
        return self.weight_bytes + self.trainable_share * trained


# Four receives ahead (`run.executor.AHEAD`), a gradient in use and one that leaves.
_MESSAGES = 6

FLOAT32 = MemoryModel(
    weight_bytes=4, grad_bytes=4, optimizer_bytes=8, reduce_bytes=4,
    outputs_kept=1, messages=_MESSAGES, shares_layers=True,
)  # fmt: skip
"""What mxn's own runner keeps in float32. A stage's input is saved by its first norm."""

MIXED = MemoryModel(
    weight_bytes=2, grad_bytes=4, optimizer_bytes=12, reduce_bytes=4,
    outputs_kept=1, messages=_MESSAGES, shares_layers=True,
)  # fmt: skip
"""What it keeps in 16 bit: gradients are summed in float32."""

SAVED_BYTES = 12.0
"""Of a trained parameter in a checkpoint: float32 weight and both moments. A rank on the processor
has them twice from its first save on, as copies in host memory are kept for the next one."""


def kept_bytes(
    layer: LayerShape, tokens: int, tp: int, recompute: Recompute, measured: float | None = None,
    *, width: float = 1.0,
) -> float:  # fmt: skip
    """Return the bytes that one layer keeps of one micro-batch until its backward, per device.

    `measured` (nothing recomputed, per device) goes before the shape's figure. Activations are
    taken as split over the tensor-parallel devices, the input kept by full recomputation too, but
    for what the shape calls whole. `width`: bytes of a value here, as a multiple of the shape's.
    Only blocks are computed again, so embedding and head keep theirs. Selective recomputation
    leaves out the shape's `core_bytes`, or keeps what a block of GPT keeps where those are unknown.
    """
    whole = measured if measured is not None else layer.kept_on(tp) * tokens * width
    border = layer.output_on(tp) * tokens * width
    if recompute == "none" or not layer.is_block:
        return whole
    if recompute == "full":
        return min(whole, border)
    if layer.core_bytes is None:
        return min(whole, _KEPT_PER_OUTPUT * border)
    return max(whole - layer.core_bytes * tokens * width / tp, 0.0)


def anew_bytes(
    layer: LayerShape, tokens: int, tp: int, recompute: Recompute, measured: float | None = None,
    *, width: float = 1.0,
) -> float:  # fmt: skip
    """Return the bytes that recomputing one layer takes for a moment; arguments as above."""
    if recompute == "none" or not layer.is_block:
        return 0.0
    whole = kept_bytes(layer, tokens, tp, "none", measured, width=width)
    if recompute == "full":
        return whole
    return whole - kept_bytes(layer, tokens, tp, recompute, measured, width=width)


def in_flight(
    schedule: Schedule,
    stage: int,
    num_stages: int,
    micro_batches: int,
    chunks: int = 1,
    extra_warmup: Sequence[int] = (),
) -> float:
    """Return how many micro-batches of activations a stage keeps at its fullest, in whole stages.

    The closed form of `schedules.stored_peak`. GPipe keeps all, 1F1B min(m, S - s), zero-bubble
    (H1) min(m, S) on every stage, for late stages put off their weight halves. With v chunks,
    each a v-th of the stage, a chunk's passes of a whole group are kept too. `extra_warmup` is
    that of the pipeline's stages.
    """
    if schedule == "gpipe":
        return float(micro_batches)
    later = num_stages - 1 - stage
    passes = num_stages if schedule == "zero-bubble" else (2 * later if chunks > 1 else later) + 1
    passes += extra_warmup[stage] if extra_warmup else 0
    group = -(-micro_batches // max(1, micro_batches // num_stages))
    return min(passes + (chunks - 1) * group, micro_batches * chunks) / chunks


def flight_bytes(
    kept: float, in_bytes: float, out_bytes: float, recompute: Recompute, model: MemoryModel
) -> float:
    """Return what one micro-batch in flight takes: what backward saves, and what is beside it."""
    saved_in = 0.0 if recompute == "full" else in_bytes * model.inputs_kept
    return kept + saved_in + out_bytes * model.outputs_kept


class Parts(NamedTuple):
    """Bytes on one device of a stage at its fullest."""

    state: float  # weights, gradients, optimizer
    activations: float  # of the micro-batches in flight, and what recomputation makes anew
    messages: float
    headroom: float
    framework: float
    copies: float = 0.0  # of the state, for checkpoints

    @property
    def total(self) -> float:
        held = self.state + self.copies + self.activations + self.messages
        return held + self.headroom + self.framework


def stage_parts(
    *,
    params: float,
    owned_params: float,
    kept_per_micro_batch: float,
    working_bytes: float,
    micro_batches_kept: float,
    model: MemoryModel,
    framework_bytes: float,
    message_bytes: float = 0.0,
    summed_params: float = 0.0,
) -> Parts:
    """Return on what the bytes of a device go.

    `params` are on this device (already divided by tensor parallelism); of `owned_params` it keeps
    the optimizer state, and copies it for checkpoints: at most, for holders of a layer that do not
    share the optimizer out write it in turn. `working_bytes` is what recomputation makes anew of
    the largest layer; 0 when nothing is recomputed. `message_bytes` are those of the largest
    message. For so many as `summed_params` it has memory in which gradients are summed as whole
    tensors.
    """
    per_param = model.weight_bytes + model.trainable_share * model.grad_bytes
    state = params * per_param
    state = state + owned_params * (model.optimizer_bytes * model.trainable_share)
    state = state + summed_params * (model.reduce_bytes * model.trainable_share)
    activations = kept_per_micro_batch * micro_batches_kept + working_bytes
    messages = model.messages * message_bytes
    copies = owned_params * (model.saved_bytes * model.trainable_share)
    headroom = (state + copies + activations + messages) * model.headroom
    return Parts(state, activations, messages, headroom, framework_bytes, copies)
