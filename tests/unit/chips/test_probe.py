"""The real probe on this machine: tools that answer, fail, hang or are absent."""

from __future__ import annotations

import pytest

from mxn.chips.chip import UnusableError
from mxn.chips.probe import Probe


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """Put a shell script on PATH in front of everything: `tool("x-smi", "echo hello")`."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(name, script):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return make


def test_a_tool_answers(tool):
    tool("x-smi", 'echo "got $1"')
    answer = Probe().run("x-smi", "-q")
    assert (answer.is_ok, answer.text) == (True, "got -q\n")


def test_a_tool_that_fails_is_not_the_same_as_no_tool(tool):
    tool("x-smi", "echo driver not loaded >&2; exit 9")
    answer = Probe().run("x-smi")
    assert (answer.is_ok, answer.status, answer.error) == (False, 9, "driver not loaded")
    assert Probe().run("y-smi") is None


def test_a_tool_that_hangs_is_given_up(tool):
    tool("x-smi", "exec sleep 30")
    answer = Probe().run("x-smi", timeout_s=0.2)
    assert (answer.is_ok, answer.status) == (False, None)
    assert "no answer within" in answer.error


def test_files_and_modules_that_are_not_there_are_none():
    probe = Probe()
    assert probe.read("/proc/no/such/file") is None
    assert not probe.has_module("torch_npu_that_is_not_there")
    assert probe.version_of("no-such-distribution") is None


def test_a_device_type_that_torch_lacks_has_no_devices_and_a_bad_package_is_unusable():
    probe = Probe()
    assert probe.torch("gcu").devices == ()
    with pytest.raises(UnusableError, match="ModuleNotFoundError"):
        probe.torch("gcu", "torch_gcu_that_is_not_there")
