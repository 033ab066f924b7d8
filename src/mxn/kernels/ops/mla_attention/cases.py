"""Parity cases of `mla_attention`: whatever lies outside a context is NaN."""

from __future__ import annotations

from typing import Any

from mxn.kernels.ops.paged_attention.cases import LONG, STEPS, paged_batch, poisoned_cache
from mxn.kernels.parity import Case, Maker


def _build(
    make: Maker,
    step: tuple[tuple[int, int], ...],
    heads: int,
    latent: int,
    rope_dim: int,
    page_tokens: int,
    is_in_order: bool,
) -> tuple[Any, ...]:
    batch, num_pages = paged_batch(make, step, page_tokens, is_in_order)
    q = make.normal(batch.query_starts[-1], heads, latent + rope_dim)
    cache = poisoned_cache(make, batch, num_pages, 1, latent + rope_dim)
    return q, cache, batch, (latent + rope_dim) ** -0.5, latent


_DECODE_16 = tuple((1, 250 + 3 * i) for i in range(16))

CASES = (
    *(
        Case(
            name=f"mla_attention {name} N{v[0]} latent {v[1]}+{v[2]} K{v[3]}"
            f"{' in order' if v[4] else ''}",
            build=lambda make, a=(step, *v): _build(make, *a),
            slack=2.0,  # probabilities may be rounded before they weigh the values
        )
        for name, step in STEPS.items()
        for v in ((4, 32, 8, 16, False), (4, 32, 8, 16, True), (3, 17, 4, 5, False))
    ),
    Case(
        name="mla_attention decode long",
        build=lambda make: _build(make, LONG, 4, 32, 8, 16, False),
        slack=2.0,  # as above
    ),
    Case(
        name="mla_attention decode 16 typical",
        build=lambda make: _build(make, _DECODE_16, 16, 512, 64, 16, False),
        dtypes=(),  # too large for the loops of the truth
        is_typical=True,
    ),
)
