"""Recorded answers of the vendors' tools; fixtures/README.md says where their formats come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from mxn.chips.sim.testing import sim  # noqa: F401

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def said():
    """Return what a tool printed: `said("npu-smi.txt")`."""
    return lambda name: (FIXTURES / name).read_text()
