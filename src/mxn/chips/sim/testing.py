"""For tests: the fixture `sim`, and the reason why there is none.

    from mxn.chips.sim.testing import sim  # in a conftest.py

    def test_something(sim):
        x = torch.ones(3, device=sim)

A machine without a compiler, or another PyTorch, skips with that reason. A build that fails does
not skip: then somebody broke the C++.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from mxn.chips.sim import build, device, knobs

if TYPE_CHECKING:
    import torch


def skip_reason() -> str | None:
    """Return why this machine cannot have a simulated chip, or None when it can."""
    error = None if device.is_loaded() else build.why_unsupported()
    return error and error.message


@pytest.fixture
def sim() -> Iterator[torch.device]:
    """``torch.device("sim:0")``, healthy, fast, with counters at zero; healed again afterwards."""
    import torch

    reason = skip_reason()
    if reason:
        pytest.skip(reason)
    device.load()
    memory_bytes = knobs.current().memory_bytes
    knobs.reset()
    yield torch.device("sim:0")
    knobs.reset()
    knobs.set(memory_bytes=memory_bytes)
