"""What the simulated chip tells the rest of mxn."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mxn.chips.chip import UnusableError
from mxn.chips.probe import Probe
from mxn.chips.sim.plugin import SimChip
from mxn.errors import ConfigError


def test_detection_does_not_show_it_unasked_and_loads_nothing():
    code = """
import sys
from mxn.chips.probe import Probe
from mxn.chips.sim.plugin import SimChip
print(SimChip().detect(Probe()), "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[] False"


def test_an_odd_value_of_the_variable_is_refused(monkeypatch):
    monkeypatch.setenv("MXN_SIM", "yes")
    with pytest.raises(ConfigError, match="MXN_SIM must be 0 or 1, got 'yes'"):
        SimChip().detect(Probe())


def test_a_listed_chip_that_cannot_be_built_is_unusable_with_the_reason(monkeypatch):
    from mxn.chips.sim import device
    from mxn.errors import UnsupportedError

    def refuse():
        raise UnsupportedError("no compiler", hint="install g++")

    monkeypatch.setenv("MXN_SIM", "1")
    monkeypatch.setattr(device, "load", refuse)
    with pytest.raises(UnusableError, match="no compiler\nhint: install g\\+\\+"):
        SimChip().detect(Probe())


@pytest.mark.sim
def test_detection_shows_it_when_asked(sim, monkeypatch):
    import torch

    monkeypatch.setenv("MXN_SIM", "1")
    devices = SimChip().detect(Probe())
    assert [d.id for d in devices] == [f"sim:{i}" for i in range(torch.sim.device_count())]
    assert {(d.chip, d.vendor, d.collective) for d in devices} == {
        ("simulated", "simulated", "simccl")
    }
    assert SimChip.basis == "simulated"


@pytest.mark.sim
def test_memory_is_read_from_the_device(sim):
    import torch

    from mxn.chips.sim import knobs

    chip = SimChip()
    device = chip.on_request(Probe())[1]
    with knobs.override(memory_bytes=2**24):
        free, total = chip.memory(device, Probe())
        x = torch.ones(1024, device=device.torch_device)
        assert total == 2**24
        assert free - chip.memory(device, Probe())[0] == x.nbytes
