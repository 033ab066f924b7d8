"""Parity cases of `kv_write`: caches full of NaN, which must stay where nothing is written."""

from __future__ import annotations

from typing import Any

from mxn.kernels.parity import Case, Maker, Outputs


def _build(
    make: Maker, tokens: int, pages: int, page_tokens: int, groups: int, k_dim: int, v_dim: int
) -> tuple[Any, ...]:
    k, v = make.normal(tokens, groups * k_dim + 1)[:, 1:], make.normal(tokens, groups, v_dim)
    k_cache = make.normal(pages, page_tokens, groups, k_dim).fill_(float("nan"))
    v_cache = make.normal(pages, page_tokens, groups, v_dim).fill_(float("nan"))
    slots = make.permutation(pages * page_tokens)[:tokens]
    k = k.unflatten(1, (groups, k_dim))
    return (k, v, k_cache, v_cache, slots) if v_dim else (k, None, k_cache, None, slots)


def _caches(args: tuple[Any, ...], _result: object) -> Outputs:
    caches = {"k_cache": args[2], "v_cache": args[3]}
    return {name: cache for name, cache in caches.items() if cache is not None}


CASES = tuple(
    Case(
        name=f"kv_write T{t} pages {p}x{s} G{g} H{h} J{j}",
        build=lambda make, a=(t, p, s, g, h, j): _build(make, *a),
        outputs=_caches,
        is_typical=t == 16,
    )
    for t, p, s, g, h, j in (
        (0, 2, 4, 1, 8, 8),
        (1, 1, 1, 1, 1, 1),
        (7, 3, 5, 2, 13, 7),
        (7, 3, 5, 1, 24, 0),
        (16, 64, 16, 8, 128, 128),
    )
)
