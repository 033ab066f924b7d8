"""What the engine asks of a model, whether a native spec or the fallback implements it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, device, dtype

    from mxn.kernels.batch import StepBatch
    from mxn.models.spec import KvShape


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The paged cache of one layer on a device.

    Shapes: k [num_pages, K, G, H]; v [num_pages, K, G, J], or None for MLA, where the values are a
    part of k.
    """

    k: Tensor
    v: Tensor | None


class CausalLM(Protocol):
    """A decoder that works on flattened tokens over a paged cache."""

    vocab_size: int
    max_positions: int
    kv_shapes: tuple[KvShape, ...]  # one for each layer that has a cache
    dtype: dtype
    device: device

    def forward(self, batch: StepBatch, cache: list[LayerCache]) -> Tensor:
        """Write the step's keys and values into `cache` and return logits [R, V], float32."""
        ...


@runtime_checkable
class OwnsCache(Protocol):
    """A decoder whose cache has a layout of its own; others get tensors shaped by `kv_shapes`."""

    def page_bytes(self, page_tokens: int) -> int:
        """Return the bytes of one page over all layers."""
        ...

    def make_cache(self, num_pages: int, page_tokens: int) -> list[LayerCache]:
        """Return the zeroed cache of each layer."""
        ...


@runtime_checkable
class PredictsAhead(Protocol):
    """A decoder that may have layers which guess the token after the next one."""

    @property
    def mtp(self) -> Sequence[object]:
        """The prediction layers; empty when it has none."""
        ...

    def forward_hidden(self, batch: StepBatch, cache: list[LayerCache]) -> tuple[Tensor, Tensor]:
        """Return what `forward` does, and the rows behind the final norm [T, D]."""
        ...

    def predict_after_next(
        self, normed_TD: Tensor, batch: StepBatch, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """Return logits [R, V] of the rows that `batch` wants, and the layer's output [T, D].

        `normed_TD` is what `forward_hidden` gave at positions t, or this layer's output; `batch`
        holds the tokens at t + 1, at positions t; `cache` is the layer's own.
        """
        ...


class TextEncoder(Protocol):
    """An encoder that turns token sequences into vectors or scores."""

    vocab_size: int
    max_positions: int
    dtype: dtype
    device: device

    def encode(
        self, sequences: list[list[int]], token_types: list[list[int]] | None = None
    ) -> Tensor:
        """Return float32 [len(sequences), D] embeddings, or [.., num_labels] logits."""
        ...
