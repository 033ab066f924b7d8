"""Small unsigned integers out of int32 words, lowest bits first. Knows no checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column that AWQ's GEMM layout stores in nibble i of a word (made for its CUDA kernel)."""


def unpack_words(words: Tensor, bits: int, dim: int) -> Tensor:
    """Return uint8 values; `dim` of the result is ``32 / bits`` times as long.

    Shapes: words int32 [A, B]; `dim` 0 or 1; `bits` 4 or 8.
    """
    import torch

    if dim == 0:
        return unpack_words(words.t(), bits, 1).t().contiguous()
    # Words lie in the file and here with their lowest byte first.
    octets = words.contiguous().view(-1).view(torch.uint8).view(words.shape[0], -1)
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), dim=-1).view(words.shape[0], -1)


def unpack_awq(words: Tensor) -> Tensor:
    """Return the 4-bit values of AWQ's GEMM layout: int32 [A, B] -> uint8 [A, 8 * B]."""
    import torch

    stored = unpack_words(words, 4, 1).view(words.shape[0], -1, 8)
    values = torch.empty_like(stored)
    values[:, :, list(AWQ_ORDER)] = stored
    return values.view(words.shape[0], -1)
