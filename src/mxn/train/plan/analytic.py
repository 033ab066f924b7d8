"""A profile for a chip that nobody measured: a roofline whose efficiency depends on size.

Start at `derive_profile`. Knows a chip's numbers and a layer's work; does not know kernels, so its
profiles are `derived` and a measured one should replace them. `Roofline` holds what was fitted and
what was taken from Calculon's published description of an A100.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mxn.errors import UserError
from mxn.train.plan.cluster import Link
from mxn.train.plan.links import ring_s
from mxn.train.plan.profile import ChipProfile, LayerCost
from mxn.train.plan.shape import LayerShape, ModelShape

if TYPE_CHECKING:
    from mxn.chips.specs import Figure, Spec

Anchors = tuple[tuple[float, float], ...]
"""(size, efficiency), sizes rising; linear in the logarithm of the size in between."""

# Isaev et al. 2023 (Calculon), A100: share of the peak by work of one product, and of the memory
# rate by bytes of one pass.
PRODUCT_SHARE: Anchors = ((1e9, 0.6), (16e9, 0.9), (128e9, 0.99))
MEMORY_SHARE: Anchors = ((1e5, 0.3), (1e6, 0.7), (1e7, 0.9), (1e8, 0.95))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipNumbers:
    """What a data sheet says of one device, in the job's dtype."""

    name: str
    peak_flop_per_s: float
    memory_bytes_per_s: float
    memory_bytes: int
    tensor_link: Link | None = None  # between two devices of a node; None: one device per stage
    basis: str = "datasheet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What data sheets leave out. Seconds, shares and bytes; the same for all chips and sizes.

    The figures are those of `fits/roofline.json`, fitted on half of vTrain's A100 runs; a test
    holds the two together.
    """

    product_share: Anchors = PRODUCT_SHARE
    top_share: float = 0.75  # of the peak, that no product passes
    memory_share: Anchors = MEMORY_SHARE
    passes: float = 3.823  # times that the kept activations go through memory in a forward
    odd_share: float = 0.3598  # of a product whose width is no multiple of 8
    block_launch_s: float = 0.001024  # host's time to launch a forward; a backward takes twice
    tensor_launch_s: float = 9.947e-05  # more for each doubling of the tensor-parallel width
    border_launch_s: float = 0.0006947  # host's time for embedding or head, forward
    update_bytes: float = 41.11  # read and written per parameter by Adam in mixed precision
    products: Mapping[str, int] = field(
        default_factory=lambda: {"embedding": 1, "block": 6, "head": 1}
    )


def share_at(anchors: Anchors, size: float) -> float:
    """Return the efficiency at `size`: flat beyond the ends, linear in log size between anchors."""
    sizes = [at for at, _ in anchors]
    if size <= sizes[0]:
        return anchors[0][1]
    if size >= sizes[-1]:
        return anchors[-1][1]
    at = bisect_left(sizes, size)
    (low, low_share), (high, high_share) = anchors[at - 1], anchors[at]
    return low_share + (high_share - low_share) * math.log(size / low) / math.log(high / low)


def derive_profile(
    chip: ChipNumbers,
    shape: ModelShape,
    micro_batches: Iterable[int],
    tps: Iterable[int],
    *,
    roofline: Roofline | None = None,
    framework_bytes: float = 2e9,
    widths: Mapping[str, int] | None = None,
) -> ChipProfile:
    """Return a derived profile of `shape` for each micro-batch and tensor-parallel width.

    A pass takes what products and memory traffic take, or what its launches take if that is more;
    the sums of tensor parallelism (two per block and pass) come on top. `widths` are columns of a
    kind's product where an odd number of them hurts. `framework_bytes` is an assumption.
    Raises: UserError for a width above 1 on a chip without a tensor link.
    """
    roofline = roofline or Roofline()
    costs: dict[tuple[str, int, int], LayerCost] = {}
    kinds = {layer.kind: layer for layer in shape.layers}
    pairs = [(mbs, tp) for mbs in micro_batches for tp in tps]
    for mbs, tp in pairs:
        if tp > 1 and chip.tensor_link is None:
            raise UserError(
                f"no link between the devices of {chip.name!r}, needed for width {tp}",
                hint="give ChipNumbers.tensor_link, or use width 1",
            )
        for kind, layer in kinds.items():
            columns = (widths or {}).get(kind, 8 * tp)
            costs[kind, mbs, tp] = _layer(
                chip, layer, mbs * shape.seq_tokens, tp, columns, roofline
            )
    return ChipProfile(
        chip=chip.name,
        costs=costs,
        framework_bytes=framework_bytes,
        basis="assumed" if chip.basis == "assumed" else "derived",
        notes=(f"roofline from {chip.basis} figures",),
    )


def _layer(
    chip: ChipNumbers, layer: LayerShape, tokens: int, tp: int, columns: int, roofline: Roofline
) -> LayerCost:
    is_block = layer.kind.startswith("block")
    product_s = _product_s(chip, layer, tokens, tp, columns, roofline)
    # `passes` was fitted with a block's bytes divided by the width: what is whole was in the times.
    kept = layer.activation_bytes / tp if is_block else layer.kept_on(tp)
    moved = roofline.passes * kept * tokens
    rate = chip.memory_bytes_per_s * share_at(roofline.memory_share, moved / 10)
    launch_s = roofline.block_launch_s + roofline.tensor_launch_s * math.log2(tp)
    if not is_block:
        launch_s = roofline.border_launch_s
    sums_s = 0.0
    if chip.tensor_link is not None and is_block:
        sums_s = 2 * ring_s(tp, layer.output_bytes * tokens, chip.tensor_link)
    work_s = product_s + moved / rate
    update_s = (
        layer.params_on(tp)
        * roofline.update_bytes
        / (chip.memory_bytes_per_s * share_at(roofline.memory_share, 1e8))
    )
    return LayerCost(
        forward_s=max(work_s + sums_s, launch_s),
        backward_s=max(2 * work_s + sums_s, 2 * launch_s),
        weight_s=product_s,
        optimizer_s=update_s,
    )


def _product_s(
    chip: ChipNumbers, layer: LayerShape, tokens: int, tp: int, columns: int, roofline: Roofline
) -> float:
    flop = layer.flop_on(tp) * tokens
    if flop <= 0:
        return 0.0
    kind = "block" if layer.kind.startswith("block") else layer.kind
    each = flop / roofline.products.get(kind, 1)
    share = min(share_at(roofline.product_share, each), roofline.top_share)
    if columns // tp % 8:
        share *= roofline.odd_share
    return flop / (chip.peak_flop_per_s * share)


def numbers_of(spec: Spec, *, dtype: str = "bf16", tensor_link: Link | None = None) -> ChipNumbers:
    """Return a catalogued chip's numbers in `dtype` (fp16 stands in where bf16 is not listed).

    The tensor link is the catalogue's measured all-reduce rate, else half of its two-way link rate.
    Raises: UserError when peak or memory rate are unknown.
    """
    peak = _figure(spec, dtype) or (_figure(spec, "fp16") if dtype == "bf16" else None)
    rate = _figure(spec, "memory rate")
    size = _figure(spec, "memory")
    if peak is None or rate is None or size is None:
        missing = [
            what
            for what, figure in (("peak", peak), ("memory rate", rate), ("memory", size))
            if figure is None
        ]
        raise UserError(
            f"the catalogue has no {' and no '.join(missing)} of {spec.name!r} ({dtype})",
            hint="measure the chip, or add the figure to its file",
        )
    bases = [figure.basis for figure in (peak, rate, size)]
    return ChipNumbers(
        name=spec.name,
        peak_flop_per_s=peak.value * _scale(peak.unit),
        memory_bytes_per_s=rate.value * _scale(rate.unit),
        memory_bytes=int(size.value),
        tensor_link=tensor_link or _catalogue_link(spec),
        basis="assumed" if "assumed" in bases else "datasheet",
    )


def _figure(spec: Spec, what: str) -> Figure | None:
    """Return the upper bound of a figure, or a measurement where there is nothing else."""
    return spec.best(what) or next(iter(spec.all(what)), None)


def _scale(unit: str) -> float:
    return {"TFLOP/s": 1e12, "TOP/s": 1e12, "GB/s": 1e9, "B": 1.0}[unit]


def _catalogue_link(spec: Spec) -> Link | None:
    measured = spec.all("all-reduce")
    if measured:
        # An all-reduce rate is the bus rate of a ring: what one link of it carries.
        return Link(latency_s=1e-5, bytes_per_s=measured[0].value * 1e9, basis=measured[0].basis)
    sheet = _figure(spec, "link")
    if sheet is None:
        return None
    return Link(latency_s=1e-5, bytes_per_s=sheet.value * 1e9 / 2, basis=sheet.basis)
