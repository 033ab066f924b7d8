"""Every vendor's tool is read as its public format prints it."""

from __future__ import annotations

import pytest

from mxn.chips.registry import chip_of

MIB = 2**20

# vendor, fixture, then of each device: name, total MiB, used MiB, busy
CASES = [
    ("nvidia", "nvidia-smi.csv",
     [("NVIDIA H200", 143771, 1042, 0.37), ("NVIDIA H200", 143771, 4, None)]),
    ("amd", "rocm-smi.json",
     [("AMD Instinct MI300X", 196288, 284, 0.12),
      ("AMD Instinct MI300X", 196288, 284, 0.0)]),
    ("ascend", "npu-smi.txt", [("910B3", 65536, 53984, 0.07), ("910B3", 65536, 3314, 0.0)]),
    ("cambricon", "cnmon.txt",
     [("MLU370-X8", 23374, 1200, 0.64), ("MLU370-X8", 23374, 0, 0.0)]),
    ("moorethreads", "mthreads-gmi.txt",
     [("MTT S4000", 49152, 30094, 0.58), ("MTT S4000", 49152, 2, 0.0)]),
    ("enflame", "efsmi.txt", [("S60", 49120, None, 0.025), ("S60", 49120, None, 0.0)]),
    ("enflame", "efsmi-1.7.txt", [("Enflame L300", 147456, None, 0.0)]),
    ("metax", "mx-smi.txt", [("MetaX C500", 65536, 858, 0.83), ("MetaX C500", 65536, 858, 0.0)]),
    ("metax", "mx-smi-2.3.txt", [("MetaX C500", 65536, 826, 0.05)]),
    ("iluvatar", "ixsmi.txt", [("Iluvatar BI-V150", 65536, 257, 0.21)]),
    ("hygon", "hy-smi.txt", [("DCU", None, None, 0.09), ("DCU", None, None, 0.0)]),
    ("kunlunxin", "kunlun-xpu-smi.txt", [("P800 OAM", 98304, 100, 0.33)]),
    ("intel", "intel-xpu-smi.json", [("Intel(R) Data Center GPU Max 1550", None, None, None)]),
    ("gaudi", "hl-smi.csv", [("HL-225", 98304, 768, 0.15), ("HL-225", 98304, 768, 0.0)]),
    ("thead", "ppu-smi.csv", [("PPU-ZW810E", 98304, 512, 0.40)]),
    ("biren", "brsmi.txt", [("Biren104P", 32512, 512, 0.11)]),
]  # fmt: skip


@pytest.mark.parametrize(("vendor", "fixture", "want"), CASES, ids=[case[1] for case in CASES])
def test_a_tool_is_read_as_it_prints(vendor, fixture, want, said):
    rows = chip_of(vendor).parse(said(fixture))
    assert [row.index for row in rows] == list(range(len(want)))
    for row, (name, total, used, busy) in zip(rows, want, strict=True):
        assert row.name == name
        assert row.memory_bytes == (None if total is None else total * MIB)
        assert row.used_bytes == (None if used is None else pytest.approx(used * MIB, rel=1e-6))
        assert row.busy == (None if busy is None else pytest.approx(busy))


@pytest.mark.parametrize("vendor", sorted({case[0] for case in CASES}))
@pytest.mark.parametrize(
    "text", ["", "No devices were found", "{", "driver not loaded (-9)", "card0: []"]
)
def test_a_tool_that_prints_something_else_lists_nothing(vendor, text):
    assert chip_of(vendor).parse(text) == []


def test_two_makers_of_one_tool_name_do_not_read_each_other(said):
    assert chip_of("kunlunxin").parse(said("intel-xpu-smi.json")) == []
    assert chip_of("intel").parse(said("kunlun-xpu-smi.txt")) == []
