"""The simulated chip for the tests of this folder."""

from mxn.chips.sim.testing import sim

__all__ = ["sim"]
