"""`moe` in Triton: grouped products over sorted rows, three launches, no wait for the device.

Weights of experts without rows are never read. A token's result depends on its own row only: its
choices are added in their own order.

Shape letters: X (token, choice) pairs, b blocks of rows of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxn.kernels import triton_host as host
from mxn.kernels.ops.linear.triton_ import rows_of
from mxn.kernels.registry import kernel


@kernel(
    "moe",
    name="triton",
    chips=host.CHIPS,
    priority=host.PRIORITY,
    missing=host.missing,
    needs_proof=True,
    is_static=True,
)
def moe(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up_EFD: Tensor,
    down_EDI: Tensor,
    activation: str,
) -> Tensor:
    from mxn.kernels.triton_code import moe as code

    x_TD, gate_up_EFD, down_EDI = rows_of(x_TD), _rows_whole(gate_up_EFD), _rows_whole(down_EDI)
    num_tokens, top_k = ids_Tk.shape
    num_experts, num_dims, num_inner = down_EDI.shape
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if num_tokens == 0:
        return out_TD
    block_m = rows_of_block(num_tokens * top_k, num_experts)
    blocks = Blocks.of(ids_Tk, num_experts, block_m)
    hidden_XI, y_XD = (
        torch.empty(num_tokens * top_k, size, dtype=x_TD.dtype, device=x_TD.device)
        for size in (num_inner, num_dims)
    )
    block_f = 32 if host.backend() == "hip" or x_TD.dtype == torch.float32 else 64
    common = {
        "NUM_EXPERTS": num_experts, "BLOCK_M": block_m, "BLOCK_F": block_f, "BLOCK_D": 64,
        "num_warps": 4,
        "num_stages": 2 if host.backend() == "hip" else 3,
    }  # fmt: skip
    host.launch(
        code.gate_up, (host.ceil_div(num_inner, block_f), blocks.room), x_TD, gate_up_EFD,
        hidden_XI, *blocks.tensors(), num_dims, num_inner, x_TD.stride(0),
        *gate_up_EFD.stride()[:2], TOP_K=top_k, KIND=activation, **common,
    )  # fmt: skip
    host.launch(
        code.down, (host.ceil_div(num_dims, block_f), blocks.room), hidden_XI, down_EDI, y_XD,
        *blocks.tensors(), num_inner, num_dims, *down_EDI.stride()[:2], **common,
    )  # fmt: skip
    block = min(1024, host.power_of_two(num_dims))
    host.launch(
        code.combine, (num_tokens, host.ceil_div(num_dims, block)), y_XD, weights_Tk.contiguous(),
        out_TD, num_dims, TOP_K=top_k, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out_TD


def rows_of_block(num_pairs: int, num_experts: int) -> int:
    """Return how many rows a block has: about what one expert gets, so that little is padding."""
    least = 16 if host.backend() == "hip" else 8
    return min(64, host.power_of_two(host.ceil_div(num_pairs, num_experts), least))


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which rows of which expert each block works on; made on the device, in a fixed shape."""

    room: int  # the most blocks that there can be
    order_X: Tensor  # int64, pair at each place when sorted by expert
    experts_b: Tensor  # int64; the number of experts marks a block that does not exist
    first_rows_b: Tensor  # int64, sorted places
    end_rows_b: Tensor

    @classmethod
    def of(cls, ids_Tk: Tensor, num_experts: int, block_m: int) -> Blocks:
        """Return the blocks of a routing."""
        flat_X = ids_Tk.flatten().long()
        device, num_pairs = flat_X.device, flat_X.numel()
        room = min(num_pairs, num_pairs // block_m + min(num_experts, num_pairs))
        counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        counts_E.scatter_add_(0, flat_X, torch.ones_like(flat_X))
        ends_E = counts_E.cumsum(0)
        block_ends_E = ((counts_E + block_m - 1) // block_m).cumsum(0)
        blocks_b = torch.arange(room, device=device)
        experts_b = torch.searchsorted(block_ends_E, blocks_b, right=True)
        known_b = experts_b.clamp(max=num_experts - 1)
        before_b = block_ends_E[known_b] - (counts_E[known_b] + block_m - 1) // block_m
        first_b = ends_E[known_b] - counts_E[known_b] + (blocks_b - before_b) * block_m
        order_X = flat_X.argsort(stable=True)
        return cls(room, order_X, experts_b, first_b, ends_E[known_b])

    def tensors(self) -> tuple[Tensor, ...]:
        return self.order_X, self.experts_b, self.first_rows_b, self.end_rows_b


def _rows_whole(weight: Tensor) -> Tensor:
    return weight if weight.stride(-1) == 1 else weight.contiguous()
