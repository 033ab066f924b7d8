"""`linear` in Triton where rows are few, torch's (cuBLAS, hipBLAS) where they are many.

The dataflow of FlashDecoding++ section 5: few rows without tensor cores, more flat, many by the
library. `mxn tune` measures the two bounds for each shape (`ways.py`); without that they are
estimates. The registry times the whole against torch and takes it only where it is faster.

Shape letters: M rows of x, P parts of D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mxn.kernels import triton_host as host
from mxn.kernels.ops.linear.ways import ESTIMATE, Bounds, known, measure
from mxn.kernels.registry import dtype_name, kernel

if TYPE_CHECKING:
    from mxn.kernels.tune import Table

_MAX_PARTS = 8


class TritonLinear:
    """x[..., D] -> y[..., F]. Holds the weight as the checkpoint stores it."""

    kernel = "triton"
    __slots__ = ("bias_F", "bounds", "in_features", "num_bytes", "out_features", "weight_FD")

    def __init__(
        self, weight_FD: Tensor, bias_F: Tensor | None = None, bounds: Bounds = ESTIMATE
    ) -> None:
        self.bounds = bounds
        self.weight_FD = weight_FD if weight_FD.stride(-1) == 1 else weight_FD.contiguous()
        self.bias_F = bias_F
        self.out_features, self.in_features = weight_FD.shape
        self.num_bytes = weight_FD.nbytes + (bias_F.nbytes if bias_F is not None else 0)

    def __call__(self, x: Tensor) -> Tensor:
        rows = rows_of(x)
        if len(rows) > max(self.bounds.gemv_rows, self.bounds.flat_rows):
            return torch.nn.functional.linear(x, self.weight_FD, self.bias_F)
        y = torch.empty(len(rows), self.out_features, dtype=x.dtype, device=x.device)
        if len(rows) <= self.bounds.gemv_rows:
            self._gemv(rows, y)
        else:
            self._flat(rows, y)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _gemv(self, rows: Tensor, y: Tensor) -> None:
        from mxn.kernels.triton_code import matmul as code

        block_f = 4 if self.out_features <= 8192 else 8
        host.launch(
            code.gemv,
            (host.ceil_div(self.out_features, block_f), len(rows)),
            rows,
            self.weight_FD,
            y if self.bias_F is None else self.bias_F,
            y,
            self.in_features,
            self.out_features,
            rows.stride(0),
            self.weight_FD.stride(0),
            HAS_BIAS=self.bias_F is not None,
            BLOCK_F=block_f,
            BLOCK_D=min(512, host.power_of_two(self.in_features)),
            num_warps=4,
            num_stages=1,
        )

    def _flat(self, rows: Tensor, y: Tensor) -> None:
        from mxn.kernels.triton_code import matmul as code

        tile = FlatTile.of(len(rows), self.in_features, self.out_features, rows, block_d=64)
        parts = tile.workspace(y)
        host.launch(
            code.flat,
            tile.grid(len(rows), self.out_features),
            rows,
            self.weight_FD,
            y if self.bias_F is None else self.bias_F,
            y,
            parts,
            len(rows),
            self.in_features,
            self.out_features,
            rows.stride(0),
            self.weight_FD.stride(0),
            HAS_BIAS=self.bias_F is not None,
            NUM_PARTS=tile.num_parts,
            BLOCK_M=tile.block_m,
            BLOCK_F=tile.block_f,
            BLOCK_D=tile.block_d,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        add_parts(parts, self.bias_F, y, tile.num_parts)


class TritonWays:
    """Which way for how many rows: see `ways.py`."""

    def settle(self, made: TritonLinear, table: Table) -> str:
        weight = made.weight_FD
        shape = (made.in_features, made.out_features, dtype_name(weight.dtype), weight.device.type)
        found = known(table, *shape)
        made.bounds = found or ESTIMATE
        return f"{made.bounds}, {'measured' if found else 'an estimate'}"

    def measure(
        self, table: Table, in_features: int, out_features: int, dtype: str, device: torch.device
    ) -> str:
        def prepare(weight_FD: Tensor, bounds: Bounds) -> TritonLinear:
            return TritonLinear(weight_FD, None, bounds)

        return str(measure(table, prepare, in_features, out_features, dtype, device))


@kernel(
    "linear",
    name="triton",
    chips=host.CHIPS,
    priority=host.PRIORITY,
    missing=host.missing,
    needs_proof=True,
    ways=TritonWays(),
)
def linear(weight_FD: Tensor, bias_F: Tensor | None = None) -> TritonLinear:
    return TritonLinear(weight_FD, bias_F)


@dataclass(frozen=True, slots=True)
class FlatTile:
    """Tile sizes and number of parts of a flat product."""

    block_m: int
    block_f: int
    block_d: int
    num_parts: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(
        cls, num_rows: int, in_features: int, out_features: int, x: Tensor, block_d: int
    ) -> FlatTile:
        """Choose tiles: wide ones where F fills the chip, else half as wide, then parts of D.

        A wide tile reads x less often; the chip wants two programs for each processor.
        """
        is_hip = host.backend() == "hip"
        processors = host.num_processors(x.device)
        block_m = min(64, host.power_of_two(num_rows, 16 if is_hip else 8))
        blocks_m = host.ceil_div(num_rows, block_m)
        block_f = 64 if host.ceil_div(out_features, 64) * blocks_m >= processors else 32
        programs = host.ceil_div(out_features, block_f) * blocks_m
        tiles = host.ceil_div(in_features, block_d)
        num_parts = max(1, min(_MAX_PARTS, 2 * processors // max(1, programs), tiles // 4))
        return cls(block_m, block_f, block_d, num_parts, num_warps=4, num_stages=2 if is_hip else 4)

    def grid(self, num_rows: int, out_features: int) -> tuple[int, int, int]:
        return (
            host.ceil_div(out_features, self.block_f),
            host.ceil_div(num_rows, self.block_m),
            self.num_parts,
        )

    def workspace(self, y_MF: Tensor) -> Tensor:
        """Return float32 [P, M, F], or y itself when there is one part."""
        if self.num_parts == 1:
            return y_MF
        return torch.empty(self.num_parts, *y_MF.shape, dtype=torch.float32, device=y_MF.device)


def add_parts(parts_PMF: Tensor, bias_F: Tensor | None, y_MF: Tensor, num_parts: int) -> None:
    """Write the sum of the parts and the bias to y; nothing to do for one part."""
    from mxn.kernels.triton_code import matmul as code

    if num_parts == 1:
        return
    block = 1024
    host.launch(
        code.add_parts,
        (host.ceil_div(y_MF.numel(), block),),
        parts_PMF,
        y_MF if bias_F is None else bias_F,
        y_MF,
        y_MF.shape[1],
        y_MF.numel(),
        HAS_BIAS=bias_F is not None,
        NUM_PARTS=num_parts,
        BLOCK=block,
        num_warps=4,
    )


def rows_of(x: Tensor) -> Tensor:
    """Return x as rows [M, D], contiguous in D."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
