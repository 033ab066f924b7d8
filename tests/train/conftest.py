"""What all tests of training share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def _sim_before_backward() -> None:
    """Load the simulated chip, where it can be had, before any test runs a backward pass.

    Torch sizes its queues at the first one; for a device that comes later it fails from then on, in
    every test of this process.
    """
    from mxn.chips.sim import device
    from mxn.chips.sim.testing import skip_reason

    if skip_reason() is None:
        device.load()
