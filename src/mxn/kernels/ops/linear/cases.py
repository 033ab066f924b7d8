"""Parity cases of `linear`: the kernel prepares the weight, then takes x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mxn.kernels.parity import Case, Maker


def _call(fn: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
    weight_FD, bias_F, x = args
    return fn(weight_FD, bias_F)(x)


def _build(
    make: Maker, lead: tuple[int, ...], in_features: int, out_features: int, has_bias: bool
) -> tuple[Any, ...]:
    weight = make.normal(out_features, in_features, scale=in_features**-0.5)
    bias = make.normal(out_features) if has_bias else None
    return weight, bias, make.normal(*lead, in_features)


def _strided(make: Maker) -> tuple[Any, ...]:
    """Rows of a wider tensor, as `split` leaves them."""
    weight, _, _ = _build(make, (1,), 40, 24, False)
    return weight, None, make.normal(5, 100)[:, 30:70]


CASES = (
    *(
        Case(
            name=f"linear {lead} {k}x{n}{' bias' if bias else ''}",
            build=lambda make, a=(lead, k, n, bias): _build(make, *a),
            call=_call,
        )
        for lead, k, n, bias in (
            ((0,), 16, 8, False),
            ((0,), 16, 8, True),
            ((1,), 1, 1, True),
            ((1,), 64, 96, False),
            ((1,), 257, 127, True),
            ((4,), 61, 67, False),
            ((17,), 128, 33, True),
            ((2, 3), 48, 40, True),
            ((130,), 96, 130, False),
            ((3,), 1024, 40, True),
        )
    ),
    Case(name="linear strided x", build=_strided, call=_call),
)
