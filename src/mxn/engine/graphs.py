"""Decode steps as replays of captured graphs: one launch instead of one for each operator.

A step of one token for each sequence runs in memory that stays where it is, in sizes of which there
are few; a step of another kind, or with adapters, runs operator by operator. Knows batches, memory
and sizes; what a capture is, `Capture` knows. Start at `capture_decode`.

What is captured must learn all lengths from device tensors: a number read on the host would be
replayed as it was. Kernels say so (`Kernel.is_static`). Letters: see `mxn.kernels.batch`; B the
sequences of a graph, some of them padding, which sees no context and writes to a page of nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mxn.kernels.batch import AttentionBatch, StepBatch

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.models.base import CausalLM, LayerCache

log = logging.getLogger("mxn.engine")

MAX_SEQUENCES = 256  # of the largest graph: beyond, arithmetic takes longer than launches
_WARM_UPS = 2  # compile kernels, grow tables, choose algorithms: none may happen in a capture

Run = Callable[[], "Tensor"]


class Capture(Protocol):
    """Records what a call does on a device."""

    def record(self, run: Run) -> Run:
        """Return a call that does again what `run` does now, on the same memory.

        It returns the same tensor each time, with new numbers. Raises: whatever the device does
        when `run` cannot be recorded.
        """
        ...


class CudaCapture:
    """CUDA graphs (on AMD: HIP graphs), which share one pool of memory for what lies between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def record(self, run: Run) -> Run:
        with torch.cuda.device(self._device):
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    run()
            main.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                out = run()
            self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


@dataclass(slots=True)
class _Static:
    """Where a graph of B sequences reads its step."""

    token_ids_B: Tensor
    positions_B: Tensor
    slots_B: Tensor
    context_lens_B: Tensor
    page_table_BP: Tensor
    query_starts_B1: Tensor
    spare_slots_B: Tensor  # of the page of nobody

    @classmethod
    def empty(cls, size: int, max_pages: int, spare: Tensor, device: torch.device) -> _Static:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(
            token_ids_B=zeros(size), positions_B=zeros(size), slots_B=spare.clone(),
            context_lens_B=zeros(size), page_table_BP=zeros(size, max_pages),
            query_starts_B1=torch.arange(size + 1, device=device), spare_slots_B=spare,
        )  # fmt: skip

    def fill(self, batch: StepBatch) -> None:
        """Take over a step of at most B sequences; the rest becomes padding."""
        attention = batch.attention
        size, num_pages = attention.page_table_SP.shape
        self.token_ids_B[:size].copy_(batch.token_ids_T)
        self.positions_B[:size].copy_(batch.positions_T)
        self.slots_B[:size].copy_(attention.slots_T)
        self.context_lens_B[:size].copy_(attention.context_lens_S)
        self.page_table_BP[:size, :num_pages].copy_(attention.page_table_SP)
        if size < len(self.slots_B):
            self.slots_B[size:].copy_(self.spare_slots_B[size:])
            self.context_lens_B[size:].zero_()

    def batch(self, max_context: int, page_tokens: int) -> StepBatch:
        """Return the step to capture; the host knows only how long a context may get."""
        size = len(self.slots_B)
        attention = AttentionBatch(
            query_starts=list(range(size + 1)), context_lens=[max_context] * size,
            page_table_SP=self.page_table_BP, context_lens_S=self.context_lens_B,
            query_starts_S1=self.query_starts_B1, slots_T=self.slots_B, page_tokens=page_tokens,
        )  # fmt: skip
        return StepBatch(self.token_ids_B, self.positions_B, attention, None)


class GraphedDecoder:
    """A decoder whose decode steps are replayed where a graph fits. Implements `CausalLM`."""

    def __init__(
        self,
        decoder: CausalLM,
        cache: list[LayerCache],
        *,
        page_tokens: int,
        max_context: int,
        is_adapted: Callable[[], bool] = lambda: False,
    ) -> None:
        """The last page of `cache` belongs to nobody. `is_adapted`: the pass under way has adapters
        beside its weights, which no graph knows."""
        self.decoder = decoder
        self.vocab_size, self.max_positions = decoder.vocab_size, decoder.max_positions
        self.kv_shapes, self.dtype, self.device = decoder.kv_shapes, decoder.dtype, decoder.device
        self.num_replayed = self.num_eager = 0  # decode steps
        self._cache = cache
        self._page_tokens, self._max_context = page_tokens, max_context
        self._max_pages = -(-max_context // page_tokens)
        self._is_adapted = is_adapted
        self._graphs: dict[int, tuple[_Static, Run]] = {}  # by size, the smallest first

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many sequences the graphs have."""
        return tuple(self._graphs)

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int], how: Capture) -> str | None:
        """Record graphs of `sizes` sequences; return why one could not be, or None."""
        for size in sorted(sizes, reverse=True):  # the largest makes room for all others
            static = _Static.empty(size, self._max_pages, self._spare_slots(size), self.device)

            def run(static: _Static = static) -> Tensor:
                # A new batch each time: what kernels derive from it must be in the graph.
                batch = static.batch(self._max_context, self._page_tokens)
                return self.decoder.forward(batch, self._cache)

            try:
                self._graphs[size] = (static, how.record(run))
            except Exception as error:  # whatever a chip throws: it then runs without
                self._graphs = {}
                return (str(error).splitlines() or [type(error).__name__])[0]
        self._graphs = dict(sorted(self._graphs.items()))
        return None

    @torch.inference_mode()
    def forward(self, batch: StepBatch, cache: list[LayerCache]) -> Tensor:
        """Write the step's keys and values into `cache` and return logits [R, V], float32.

        Those of a replay are overwritten by the next one.
        """
        if not batch.attention.is_decode or batch.logits_rows_R is not None:
            return self.decoder.forward(batch, cache)
        num_sequences = batch.attention.num_sequences
        size = next((size for size in self._graphs if size >= num_sequences), None)
        if size is None or cache is not self._cache or self._is_adapted():
            self.num_eager += 1
            return self.decoder.forward(batch, cache)
        self.num_replayed += 1
        static, replay = self._graphs[size]
        static.fill(batch)
        return replay()[:num_sequences]

    def _spare_slots(self, size: int) -> Tensor:
        first = (self._cache[0].k.shape[0] - 1) * self._page_tokens
        return first + torch.arange(size, device=self.device) % self._page_tokens


def sizes_for(max_sequences: int) -> tuple[int, ...]:
    """Return the sizes to capture: powers of two, and what is the most at once.

    Padding then costs less than the step again, and there are few graphs.
    """
    most = min(max_sequences, MAX_SEQUENCES)
    return (*(1 << i for i in range((most - 1).bit_length())), most)


def why_not(model: Any) -> str | None:
    """Return why the decode steps of `model` cannot be captured, or None."""
    from mxn.models.decoder import Decoder
    from mxn.models.spec import MoeSpec

    if not isinstance(model, Decoder):
        return f"a {type(model).__name__} is not captured"
    if model.device.type != "cuda":
        return f"{model.device.type} devices have no graphs here"
    layers = model.spec.layers
    used = {"mla_attention" if layer.attention.mla else "paged_attention" for layer in layers}
    used |= {"moe" for layer in layers if isinstance(layer.ffn, MoeSpec)}
    return model.ops.why_not_static(sorted(used))


def capture_decode(
    model: CausalLM, cache: list[LayerCache], max_sequences: int, **options: Any
) -> tuple[CausalLM, str]:
    """Return `model` with graphs for its decode steps, or as it is, and a note of what it does.

    `options` are those of `GraphedDecoder`.
    """
    reason = why_not(model)
    if reason is None:
        graphed = GraphedDecoder(model, cache, **options)
        reason = graphed.capture(sizes_for(max_sequences), CudaCapture(model.device))
        if reason is None:
            note = f"decode steps of up to {graphed.sizes[-1]} sequences are replayed"
            log.info("graphs: %s", note)
            return graphed, note
    log.warning("graphs: decode runs operator by operator: %s", reason)
    return model, f"off: {reason}"
