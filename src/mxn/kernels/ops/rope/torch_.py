"""`rope` in torch, for any device.

Shape letters: R half the rotated dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels.registry import kernel


@kernel("rope", name="torch")
def rope(
    q_TNH: Tensor, k_TGH: Tensor, cos_TR: Tensor, sin_TR: Tensor, is_interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    cos_T1R, sin_T1R = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    return (
        _rotate(q_TNH, cos_T1R, sin_T1R, is_interleaved),
        _rotate(k_TGH, cos_T1R, sin_T1R, is_interleaved),
    )


def _rotate(x_TNH: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    # float32 products: in bfloat16 the angle of a far position would be rounded twice.
    wide = x_TNH[..., : 2 * half].float()
    if is_interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = wide[..., :half], wide[..., half:]
        rotated = torch.empty_like(wide)
        torch.mul(a, cos, out=rotated[..., :half]).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=rotated[..., half:]).addcmul_(a, sin)
    rotated = rotated.to(x_TNH.dtype)
    if 2 * half == x_TNH.shape[-1]:
        return rotated
    return torch.cat((rotated, x_TNH[..., 2 * half :]), dim=-1)
