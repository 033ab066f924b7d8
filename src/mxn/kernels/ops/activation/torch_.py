"""`activation` in torch, for any device."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mxn.errors import UnsupportedError
from mxn.kernels.registry import kernel

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}


@kernel("activation", name="torch")
def activation(x: Tensor, kind: str) -> Tensor:
    """Raises: UnsupportedError for a kind that is not in ACTIVATIONS."""
    if kind not in ACTIVATIONS:
        raise UnsupportedError(f"activation {kind!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[kind](x)
