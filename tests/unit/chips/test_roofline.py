"""Measuring: small on the CPU, real on any device, kept with basis and date."""

from __future__ import annotations

import json

import pytest

from mxn.chips import find_device, measured, roofline
from mxn.errors import CapacityError, ConfigError

TINY = roofline.Pace(repeats=2, product_s=0.0, buffer_share=0.0625)


@pytest.fixture
def tiny(monkeypatch):
    """A measurement of a second instead of a minute."""
    monkeypatch.setattr(roofline, "QUICK", TINY)
    monkeypatch.setattr(roofline, "_LAST_SIZE", 256)


def check(result):
    values = {r.what: r.value for r in result.readings}
    assert values["memory read"] > 1e8
    assert values["memory copy"] > 1e8
    assert 0 < values["launch"] < 1e-2
    assert values["matmul float32"] > 1e7
    assert all(r.p20 <= r.value <= r.p80 for r in result.readings)


def test_the_cpu_is_measured_kept_and_read_back(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("MXN_HOME", str(tmp_path))
    seen = []
    device = find_device("cpu")
    assert measured.load(device.chip) is None
    result = roofline.measure(device, is_quick=True, on_progress=lambda *step: seen.append(step))
    check(result)
    assert result.basis == "measured"
    assert seen[0] == ("memory", 0, 6)
    assert seen[-1] == ("done", 6, 6)
    path = measured.store(result)
    assert json.loads(path.read_text())["basis"] == "measured"
    assert measured.load(device.chip) == result


def test_what_a_device_does_not_multiply_is_kept_with_the_reason(tiny, monkeypatch):
    import torch

    def refuse(a, b):
        raise NotImplementedError("no int8 here\nlong story")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    result = roofline.measure(find_device("cpu"), is_quick=True)
    assert result.unsupported == {"matmul int8": "no int8 here"}
    assert result.reading("matmul int8") is None


@pytest.mark.sim
def test_a_simulated_device_is_measured_as_simulated(sim, tiny):
    result = roofline.measure(find_device("sim:0"), is_quick=True)
    check(result)
    assert result.basis == "simulated"


def test_too_little_memory_is_refused(monkeypatch):
    monkeypatch.setattr(roofline, "free_memory", lambda device: 1000)
    with pytest.raises(CapacityError, match="cpu:0 has 1000 bytes free"):
        roofline.measure(find_device("cpu"), is_quick=True)


@pytest.mark.parametrize("text", ["{", "{}", '{"schema": "other/9"}'])
def test_a_spoiled_file_is_refused_with_its_path(text, monkeypatch, tmp_path):
    monkeypatch.setenv("MXN_HOME", str(tmp_path))
    path = measured.path_of("x86-avx2")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"x86-avx2\.json"):
        measured.load("x86-avx2")
