"""The truth of `rope`: each pair of dims (a, b) turns by its angle.

Source: Su et al. 2021, eq. 34; pairs are (r, r + R), or (2r, 2r + 1) when interleaved.
"""

from __future__ import annotations

from torch import Tensor


def rope(
    q_TNH: Tensor, k_TGH: Tensor, cos_TR: Tensor, sin_TR: Tensor, is_interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    return (
        _rotate(q_TNH, cos_TR, sin_TR, is_interleaved),
        _rotate(k_TGH, cos_TR, sin_TR, is_interleaved),
    )


def _rotate(x_TNH: Tensor, cos_TR: Tensor, sin_TR: Tensor, is_interleaved: bool) -> Tensor:
    out = x_TNH.clone()
    half = cos_TR.shape[1]
    for r in range(half):
        i, j = (2 * r, 2 * r + 1) if is_interleaved else (r, r + half)
        a, b = x_TNH[..., i].float(), x_TNH[..., j].float()
        cos, sin = cos_TR[:, r : r + 1], sin_TR[:, r : r + 1]
        out[..., i] = (a * cos - b * sin).to(x_TNH.dtype)
        out[..., j] = (b * cos + a * sin).to(x_TNH.dtype)
    return out
