"""`mxn chips`, its JSON and its explanations."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from mxn.chips import discovery, roofline
from mxn.chips.chip import UnusableError
from mxn.chips.testing import RecordedProbe
from mxn.cli import chips

CPUINFO = {"/proc/cpuinfo": "model name : Some CPU\nflags : avx2 fma\n"}


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """Run the command on a recorded machine, with a home of its own."""
    probe = RecordedProbe(
        files=CPUINFO | {"/dev/davinci0": ""}, tools={"npu-smi": ""}, family="x86_64"
    )
    monkeypatch.setattr(discovery, "Probe", lambda: probe)
    monkeypatch.setenv("MXN_HOME", str(tmp_path))
    return lambda *words: CliRunner().invoke(chips.app, list(words), catch_exceptions=False)


def test_it_lists_devices_and_points_at_what_is_not_usable(cli):
    done = cli()
    assert done.exit_code == 0
    assert "x86-avx2" in done.stdout
    assert "not usable: ascend" in done.stderr


def test_explain_says_why_there_is_and_why_there_is_not(cli):
    text = cli("--explain").stdout
    assert "cpu:0 is x86-avx2 (cpu) because" in text
    assert "/dev/davinci0" in text
    assert "package 'torch_npu' is not installed" in text
    assert "nvidia: none of: nvidia-smi" in text


def test_json_holds_free_memory_and_load(cli):
    data = json.loads(cli("--json").stdout)
    row = data["devices"][0]
    assert (row["id"], row["chip"]) == ("cpu:0", "x86-avx2")
    assert row["free_bytes"] == 12 * 2**30
    assert row["utilization"] == 0.25
    assert "absent" not in data
    assert "ascend" in json.loads(cli("--json", "--explain").stdout)["unusable"]


def test_a_driver_that_does_not_tell_its_memory_does_not_hide_the_device(cli, monkeypatch):
    def silent(device, probe=None):
        raise UnusableError("the driver is silent", device=device.id)

    monkeypatch.setattr(discovery, "free_memory", silent)
    done = cli()
    assert "x86-avx2" in done.stdout
    assert "unknown" in done.stdout
    assert "cpu:0: the driver is silent" in done.stderr


def test_measure_prints_stores_and_is_listed_afterwards(cli, monkeypatch):
    monkeypatch.setattr(roofline, "QUICK", roofline.Pace(2, 0.0, 0.0625))
    monkeypatch.setattr(roofline, "_LAST_SIZE", 256)
    done = cli("measure", "--quick", "--device", "cpu", "--json")
    assert json.loads(done.stdout)["schema"] == roofline.SCHEMA
    assert "stored in" in done.stderr
    assert "measured" in cli().stdout


def test_specs_show_the_basis(cli):
    line = next(x for x in cli("specs").stdout.splitlines() if "nvidia-h200" in x)
    assert "989.4~" in line
    data = json.loads(cli("specs", "--json").stdout)
    assert {f["basis"] for s in data for f in s["figures"]} <= {
        "datasheet", "measured", "derived", "assumed",
    }  # fmt: skip
