"""The ops on the simulated chip: they may not know that they run on a `cpu` or a `cuda`."""

from __future__ import annotations

import pytest
import torch

from mxn.kernels import parity, registry

pytestmark = pytest.mark.sim


@pytest.mark.parametrize("op", registry.all_ops())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=registry.dtype_name)
def test_torch_kernel_runs_on_the_simulated_chip(
    op: str, dtype: torch.dtype, sim: torch.device
) -> None:
    result = parity.check_kernel(registry.kernels_of(op)["torch"], sim, dtype)
    assert result.is_passed, "\n".join(result.failures)
