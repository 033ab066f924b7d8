"""Linear layers over packed weights in Triton: W4A16 and W8A8. Prepared like `linear`'s kernels.

No op offers them yet: a loader that has packed weights builds them directly. All rows go through
the same flat product; many rows (prefill) are not tuned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxn.kernels import triton_host as host
from mxn.kernels.ops.linear.packed import Int4Weight, Int8Weight
from mxn.kernels.ops.linear.triton_ import FlatTile, add_parts, rows_of


class TritonInt4Linear:
    """x[..., D] -> y[..., F] with int4 weights by groups; x in float32, float16 or bfloat16."""

    kernel = "triton_int4"
    __slots__ = ("bias_F", "in_features", "num_bytes", "out_features", "weight")

    def __init__(self, weight: Int4Weight, bias_F: Tensor | None = None) -> None:
        self.weight = weight
        self.bias_F = bias_F
        self.out_features, self.in_features = len(weight.values), 2 * weight.values.shape[1]
        parts = (weight.values, weight.scales, weight.zeros, bias_F)
        self.num_bytes = sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x: Tensor) -> Tensor:
        from mxn.kernels.triton_code import quantized as code

        rows = rows_of(x)
        y = torch.empty(len(rows), self.out_features, dtype=x.dtype, device=x.device)
        tile = FlatTile.of(
            len(rows), self.in_features, self.out_features, rows, block_d=self.weight.group_size
        )
        parts = tile.workspace(y)
        host.launch(
            code.flat_int4,
            tile.grid(len(rows), self.out_features),
            rows,
            self.weight.values,
            self.weight.scales,
            self.weight.zeros,
            y if self.bias_F is None else self.bias_F,
            y,
            parts,
            len(rows),
            self.in_features,
            self.out_features,
            rows.stride(0),
            HAS_BIAS=self.bias_F is not None,
            NUM_PARTS=tile.num_parts,
            GROUP=self.weight.group_size,
            BLOCK_M=tile.block_m,
            BLOCK_F=tile.block_f,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        add_parts(parts, self.bias_F, y, tile.num_parts)
        return y.reshape(*x.shape[:-1], self.out_features)


class TritonInt8Linear:
    """x[..., D] -> y[..., F]: int8 weights by out feature, x rounded to int8 by row when called."""

    kernel = "triton_int8"
    __slots__ = ("bias_F", "in_features", "num_bytes", "out_features", "weight")

    def __init__(self, weight: Int8Weight, bias_F: Tensor | None = None) -> None:
        self.weight = weight
        self.bias_F = bias_F
        self.out_features, self.in_features = weight.values.shape
        parts = (weight.values, weight.scales, bias_F)
        self.num_bytes = sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x: Tensor) -> Tensor:
        from mxn.kernels.triton_code import quantized as code

        rows = rows_of(x)
        values, scales = quantize_rows(rows)
        y = torch.empty(len(rows), self.out_features, dtype=x.dtype, device=x.device)
        tile = FlatTile.of(len(rows), self.in_features, self.out_features, rows, block_d=128)
        parts = tile.workspace(y)
        host.launch(
            code.flat_int8,
            tile.grid(len(rows), self.out_features),
            values,
            scales,
            self.weight.values,
            self.weight.scales,
            y if self.bias_F is None else self.bias_F,
            y,
            parts,
            len(rows),
            self.in_features,
            self.out_features,
            HAS_BIAS=self.bias_F is not None,
            NUM_PARTS=tile.num_parts,
            BLOCK_M=tile.block_m,
            BLOCK_F=tile.block_f,
            BLOCK_D=tile.block_d,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        add_parts(parts, self.bias_F, y, tile.num_parts)
        return y.reshape(*x.shape[:-1], self.out_features)


def quantize_rows(x_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [M, D] and float32 scales [M]; as `packed.quantize_rows`, in one launch."""
    from mxn.kernels.triton_code import quantized as code

    values = torch.empty(x_MD.shape, dtype=torch.int8, device=x_MD.device)
    scales = torch.empty(len(x_MD), dtype=torch.float32, device=x_MD.device)
    host.launch(
        code.quantize_rows,
        (len(x_MD),),
        x_MD,
        values,
        scales,
        x_MD.shape[1],
        x_MD.stride(0),
        BLOCK_D=min(2048, host.power_of_two(x_MD.shape[1])),
        num_warps=4,
    )
    return values, scales
