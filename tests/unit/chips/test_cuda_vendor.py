"""Who is behind `cuda`: evidence decides, is kept, and may be too thin."""

from __future__ import annotations

import pytest

from mxn.chips.cuda_alike import guess_vendor
from mxn.chips.probe import Answer, TorchDevice
from mxn.chips.testing import RecordedProbe

GB = 10**9


def machine(*names, arch="", tools=None, memory=64 * GB, **settings):
    devices = tuple(TorchDevice(name, memory, arch, True) for name in names)
    return RecordedProbe(tools=tools or {}, backends={"cuda": devices}, **settings)


DRIVER = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"

KNOWN = [
    ("nvidia", machine("NVIDIA H200", arch="sm_90"), "name='NVIDIA H200'"),
    ("nvidia", machine("Tesla T4", tools={DRIVER: "550.54.15\n"}), "NVML driver version 550.54.15"),
    ("amd", machine("AMD Instinct MI300X", hip="6.3"), "torch.version.hip=6.3"),
    ("amd", machine("gfx1100", hip="6.3"), "torch.version.hip=6.3"),
    ("hygon", machine("BW200", hip="6.3"), "name='BW200'"),
    ("hygon", machine("K100_AI", hip="5.7"), "name='K100_AI'"),
    ("hygon", machine("", hip="5.7", tools={"hy-smi": ""}),
     "torch.version.hip=5.7, hy-smi on PATH"),
    ("hygon", machine("", hip="5.7", arch="gfx936"), "torch.version.hip=5.7, arch=gfx936"),
    ("metax", machine("MetaX C500"), "name='MetaX C500'"),
    ("metax", machine("?", torch_version="2.6.0+maca3.3"), "torch=2.6.0+maca3.3"),
    ("iluvatar", machine("Iluvatar BI-V150"), "name='Iluvatar BI-V150'"),
    ("iluvatar", machine("?", tools={"ixsmi": ""}), "ixsmi on PATH"),
    ("kunlunxin", machine("P800 OAM"), "name='P800 OAM'"),
    ("kunlunxin", machine("?", versions={"xpytorch": "3.2"}), "package xpytorch=3.2"),
    ("kunlunxin", machine("?", tools={"xpu-smi": "| XPU-SMI  XPU-RT Version: 5.0 |"}),
     "xpu-smi on PATH"),
    ("thead", machine("PPU-ZW810E"), "name='PPU-ZW810E'"),
    ("thead", machine("?", tools={"ppu-smi": ""}), "ppu-smi on PATH"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("vendor", "probe", "evidence"), KNOWN, ids=[f"{v}-{e}" for v, _, e in KNOWN]
)
def test_a_maker_is_recognized_by(vendor, probe, evidence):
    guess = guess_vendor(probe)
    assert guess.vendor == vendor, guess
    assert evidence in guess.evidence


UNKNOWN = [
    (machine("Wonder GPU 9"), "nothing says who makes"),
    (machine("NVIDIA H200", torch_version="2.6.0+maca3.3"), "disagrees: nvidia or metax"),
    (machine("NVIDIA H200", hip="6.3"), "disagrees: amd or nvidia"),
    (machine("?", tools={"ixsmi": "", "mx-smi": ""}), "tools of several makers: metax, iluvatar"),
    (machine("?", tools={"mx-smi": "", DRIVER: "550.54"}), "several makers: metax, nvidia"),
    (machine("?", tools={"nvidia-smi": Answer(9, "")}), "gives no driver version"),
    (machine("?", tools={DRIVER: "Not Supported"}), "gives no driver version"),
    (machine("?", tools={"xpu-smi": "Intel(R) XPU System Management"}), "nothing says who makes"),
]


@pytest.mark.parametrize(("probe", "reason"), UNKNOWN, ids=[reason for _, reason in UNKNOWN])
def test_the_maker_is_unknown_and_the_reason_said_when(probe, reason):
    guess = guess_vendor(probe)
    assert guess.vendor is None
    assert reason in guess.reason


def test_a_tool_of_somebody_else_does_not_overrule_the_device_name():
    probe = machine("NVIDIA H200", tools={"mx-smi": "", "nvidia-smi": ""})
    assert guess_vendor(probe).vendor == "nvidia"
