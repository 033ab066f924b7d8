"""LoRA adapters over one base model: rows of a step go through the adapter of their request.

`AdaptedModel.install` puts an adapter's small matrices beside the weights they belong to; during
`applied` each weight adds them for the rows that want them. Other rows are not touched, and a model
without adapters has its weights as they were. Knows weights and rows; knows no requests and no
names. Start at `AdaptedModel`. Shape letters: see `lora_targets.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from mxn.errors import InternalError, UnsupportedError
from mxn.models.lora_targets import Piece, Slot, Target, targets_of, why_no_target

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mxn.models.lora_files import AdapterFiles


class Part(NamedTuple):
    """The rows of one sequence in a forward pass."""

    adapter: int | None  # the key it was installed under; None: the base model
    num_tokens: int
    num_logits: int


class Segment(NamedTuple):
    """Rows of a step that go through one adapter: a slice where they stand together."""

    adapter: int
    rows: slice | Tensor


@dataclass(slots=True)
class Step:
    """Which rows of the forward pass under way have an adapter; empty outside of one."""

    segments: dict[str, list[Segment]] = field(default_factory=lambda: {"tokens": [], "logits": []})
    num_rows: dict[str, int] = field(default_factory=lambda: {"tokens": 0, "logits": 0})


class Factors(NamedTuple):
    """y += x @ down @ up, the scale being a part of `up`."""

    down: Tensor
    up: Tensor


class _Adapted:
    """A weight with the factors of adapters beside it; what is not about them is the weight's."""

    def __init__(self, base: Any, slot: Slot, step: Step) -> None:
        self.base = base
        self.factors: dict[int, Factors] = {}
        self._slot = slot
        self._step = step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.base(x)
        segments = self._step.segments[self._slot.rows]
        if segments:
            self._add_all(x, y, segments)
        return y

    def _add_all(self, x: Tensor, y: Tensor, segments: list[Segment]) -> None:
        rows = self._step.num_rows[self._slot.rows]
        if not self._slot.is_per_head and x.ndim != 2:
            x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if len(x) != rows:
            raise InternalError(f"{len(x)} rows pass {self._slot.attribute}, the step has {rows}")
        for segment in segments:
            factors = self.factors.get(segment.adapter)
            if factors is not None:
                self._add(x, y, segment.rows, factors)

    def _add(self, x: Tensor, y: Tensor, rows: slice | Tensor, factors: Factors) -> None:
        raise NotImplementedError


class AdaptedLinear(_Adapted):
    """x [T, D] -> y [T, F]."""

    def _add(self, x: Tensor, y: Tensor, rows: slice | Tensor, factors: Factors) -> None:
        low = x[rows].mm(factors.down)
        if isinstance(rows, slice):
            y[rows].addmm_(low, factors.up)
        else:
            y.index_add_(0, rows, low.mm(factors.up))


class AdaptedHeads(_Adapted):
    """x [T, N, I] -> y [T, N, O]."""

    def _add(self, x: Tensor, y: Tensor, rows: slice | Tensor, factors: Factors) -> None:
        added = (x[rows].transpose(0, 1) @ factors.down @ factors.up).transpose(0, 1)
        if isinstance(rows, slice):
            y[rows].add_(added)
        else:
            y.index_add_(0, rows, added)


class AdaptedModel:
    """The slots of one model and what is installed beside them. Not thread safe."""

    def __init__(self, model: Any) -> None:
        """Raises: UnsupportedError for a model that takes no adapters."""
        self._targets: dict[str, Target] = targets_of(model)
        self._dtype: torch.dtype = model.dtype
        self._device: torch.device = model.device
        self._adapted: dict[Slot, _Adapted] = {}
        self._installed: dict[int, list[Slot]] = {}
        self._step = Step()

    def install(self, key: int, files: AdapterFiles) -> None:
        """Put an adapter beside the weights, under a key that is not in use. All or nothing.

        Raises: UnsupportedError when it belongs to another base: it names the module, both shapes
        and what the adapter was trained on.
        """
        import torch

        if key in self._installed:
            raise InternalError(f"adapter {key} is installed already")
        with torch.inference_mode():
            found = self._factors(files)
        for slot, factors in found.items():
            if slot not in self._adapted:
                kind = AdaptedHeads if slot.is_per_head else AdaptedLinear
                self._adapted[slot] = kind(slot.get(), slot, self._step)
                slot.set(self._adapted[slot])
            self._adapted[slot].factors[key] = factors
        self._installed[key] = list(found)

    def remove(self, key: int) -> None:
        """Forget an adapter; a weight without any is again as it was before the first."""
        for slot in self._installed.pop(key):
            adapted = self._adapted[slot]
            del adapted.factors[key]
            if not adapted.factors:
                slot.set(self._adapted.pop(slot).base)

    @property
    def is_applied(self) -> bool:
        """Whether the pass under way has rows that go through an adapter."""
        return bool(self._step.segments["tokens"])

    @contextmanager
    def applied(self, parts: Sequence[Part]) -> Iterator[None]:
        """Within it, a forward pass over these sequences, in this order, uses their adapters."""
        step = self._step
        step.num_rows["tokens"] = sum(part.num_tokens for part in parts)
        step.num_rows["logits"] = sum(part.num_logits for part in parts)
        keys = [part.adapter for part in parts]
        for rows, counts in (
            ("tokens", [part.num_tokens for part in parts]),
            ("logits", [part.num_logits for part in parts]),
        ):
            step.segments[rows] = segments_of(keys, counts, self._device)
        try:
            yield
        finally:
            step.segments["tokens"], step.segments["logits"] = [], []

    def _factors(self, files: AdapterFiles) -> dict[Slot, Factors]:
        """Return the factors for each slot, on the device, in the dtype of the model."""
        import torch

        pieces: dict[Slot, list[Piece]] = {}
        for module, pair in files.pairs.items():
            target = self._target(module, files, (pair.rank, pair.a_RD.shape[1]), pair.b_FR.shape)
            scaled_FR = pair.b_FR.float() * pair.scale
            for piece in target.pieces(pair.a_RD.float(), scaled_FR):
                pieces.setdefault(piece.slot, []).append(piece)
        found = {}
        for slot, parts in pieces.items():
            down, up = (parts[0].down, parts[0].up) if slot.is_per_head else _joined(slot, parts)
            found[slot] = Factors(
                *(t.to(self._device, self._dtype, copy=True).contiguous() for t in (down, up))
            )
            if not all(torch.isfinite(tensor).all().item() for tensor in found[slot]):
                raise UnsupportedError(f"the adapter has numbers that {self._dtype} cannot hold")
        return found

    def _target(
        self, module: str, files: AdapterFiles, a_shape: Sequence[int], b_shape: Sequence[int]
    ) -> Target:
        target = self._targets.get(module)
        trained_on = f"; it was trained on {files.base!r}" if files.base else ""
        if target is None:
            raise UnsupportedError(why_no_target(module, self._targets) + trained_on)
        if (a_shape[1], b_shape[0]) != (target.in_features, target.out_features):
            raise UnsupportedError(
                f"the adapter's {module!r} maps {a_shape[1]} to {b_shape[0]}, the model's maps"
                f" {target.in_features} to {target.out_features}{trained_on}",
                hint="load it on the model that it was trained on",
            )
        return target


def segments_of(
    keys: Sequence[int | None], counts: Sequence[int], device: torch.device
) -> list[Segment]:
    """Return the rows of each adapter when sequence i has ``counts[i]`` rows, one behind the other.

    The rows stay where they are, so that those of the base model get the same bits as ever.
    """
    import torch

    runs: dict[int, list[tuple[int, int]]] = {}
    first = 0
    for key, count in zip(keys, counts, strict=True):
        if key is not None and count:
            own = runs.setdefault(key, [])
            if own and own[-1][1] == first:
                own[-1] = own[-1][0], first + count
            else:
                own.append((first, first + count))
        first += count
    segments = []
    for key, own in runs.items():
        if len(own) == 1:
            segments.append(Segment(key, slice(*own[0])))
        else:
            rows = [row for run in own for row in range(*run)]
            segments.append(Segment(key, torch.tensor(rows, device=device)))
    return segments


def _joined(slot: Slot, pieces: list[Piece]) -> tuple[Tensor, Tensor]:
    """Return the factors of pieces that share their input: ranks side by side, outputs in blocks.

    One product for all parts of a fused weight; the zeros between the blocks cost less than calls.
    """
    import torch

    down_DR = torch.cat([piece.down for piece in pieces], dim=1)
    up_RF = down_DR.new_zeros(down_DR.shape[1], slot.out_features)
    rank = 0
    for piece in pieces:
        size, width = piece.up.shape
        up_RF[rank : rank + size, piece.first : piece.first + width] = piece.up
        rank += size
    return down_DR, up_RF
