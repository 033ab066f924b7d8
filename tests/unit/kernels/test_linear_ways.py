"""Which way a Triton product goes for how many rows: from recorded times, a table and a clock.

No GPU runs here: a launch moves a clock by what the way would take, and everything above (rounds,
minimum, table, bounds, the registry) is the real thing.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mxn.kernels import registry, tune
from mxn.kernels import triton_host as host
from mxn.kernels.ops.linear.ways import ESTIMATE, ROWS, Bounds, bounds_of, key_of
from mxn.kernels.registry import Ops
from mxn.kernels.tune import Table

CHIP = "nvidia-test"
# As a chip does it: one row waits for memory, the library pads few rows to 64 and wins with many.
RECORDED = {
    "gemv": {"M=1": 8.0, "M=2": 9.0, "M=4": 16.0},
    "flat": {"M=1": 9.5, "M=2": 9.5, "M=4": 9.6, "M=8": 9.7, "M=16": 10.4, "M=32": 12.0,
             "M=64": 18.0, "M=128": 31.0, "M=256": 60.0},
    "torch": {"M=1": 14.0, "M=2": 15.0, "M=4": 15.0, "M=8": 15.0, "M=16": 15.0, "M=32": 15.5,
              "M=64": 16.5, "M=128": 18.0, "M=256": 27.0},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("MXN_HOME", str(tmp_path))
    monkeypatch.setenv("MXN_KERNEL_TUNING", "off")
    monkeypatch.setenv("MXN_KERNELS", "linear=triton")
    monkeypatch.setattr(tune, "_BUSY_LOAD", 1e9)
    monkeypatch.setattr(tune, "_COLD_BYTES", 0)


@pytest.fixture
def ops(monkeypatch) -> Ops:
    """Operators of a chip whose Triton product is proven and can run."""
    entry = replace(registry.kernels_of("linear")["triton"], missing=None)
    monkeypatch.setitem(registry._KERNELS["linear"], "triton", entry)
    Table.open(CHIP).judge({"linear/triton float32": None})
    return Ops.bind("cpu", CHIP, torch.float32, only=())


class Chip:
    """A clock that launches and the library's products move."""

    def __init__(self, times) -> None:
        self.times, self.now_us = times, 0.0
        self.ways: list[tuple[str, int]] = []

    def perf_counter(self) -> float:
        return self.now_us / 1e6

    def spend(self, way: str, rows: int) -> None:
        self.ways.append((way, rows))
        self.now_us += self.times[way][f"M={rows}"]

    def launch(self, code, grid, args, options) -> None:
        name = code.__name__
        if name == "gemv":
            self.spend("gemv", grid[1])
        elif name == "flat":
            self.spend("flat", args[5])

    def library(self, x, weight, bias) -> torch.Tensor:
        self.spend("torch", len(x))
        return x.new_zeros(len(x), len(weight))


@pytest.fixture
def chip(monkeypatch):
    if importlib.util.find_spec("triton") is None:  # names are all that a launch is asked for
        names = {name: SimpleNamespace(__name__=name) for name in ("gemv", "flat", "add_parts")}
        monkeypatch.setitem(sys.modules, "mxn.kernels.triton_code.matmul", SimpleNamespace(**names))
    made = Chip(RECORDED)
    monkeypatch.setattr(tune, "time", made)
    monkeypatch.setattr(torch.nn.functional, "linear", made.library)
    with host.redirected(made.launch, host.Target("cuda", 100, True)):
        yield made


def changed(way: str, **times: float) -> dict:
    recorded = {name: dict(cases) for name, cases in RECORDED.items()}
    recorded[way] |= {case.replace("_", "="): us for case, us in times.items()}
    return recorded


@pytest.mark.parametrize(
    ("times", "want"),
    [
        (RECORDED, Bounds(2, 32)),
        (changed("gemv", M_1=9.4), Bounds(0, 32)),  # within the noise of the flat product
        (changed("gemv", M_4=9.0), Bounds(4, 32)),
        (changed("torch", M_1=1.0), Bounds(0, 0)),  # never ahead at once: all by the library
        (changed("torch", M_4=9.0), Bounds(2, 2)),  # a hole: what comes behind is not trusted
        (changed("torch", M_64=99.0, M_128=99.0, M_256=99.0), Bounds(2, 256)),
        (changed("torch", M_64=18.3), Bounds(2, 32)),  # ahead by less than noise
    ],
)
def test_bounds_are_where_a_way_stops_winning(times, want):
    assert bounds_of(times) == want


def test_a_measured_shape_is_used_and_others_keep_the_estimate(ops):
    Table.open(CHIP).store(key_of(32, 48, "float32", "cpu"), RECORDED)
    ops = Ops.bind("cpu", CHIP, torch.float32, only=())
    assert ops.prepare_linear(torch.ones(48, 32)).bounds == Bounds(2, 32)
    assert ops.prepare_linear(torch.ones(64, 32)).bounds == ESTIMATE
    reasons = {choice.shape: choice.reason for choice in ops.explain()}
    assert reasons["32x48 float32"].endswith("; gemv to 2, flat to 32 rows, measured")
    assert reasons["32x64 float32"].endswith("; gemv to 1, flat to 64 rows, an estimate")


def test_measuring_stores_what_the_next_load_uses(ops, chip):
    stale = "linear 32x48 float32 cpu t1"
    Table.open(CHIP).store(stale, {"torch": {"M=1": 1.0}, "triton": {"M=1": 2.0}})
    ops.prepare_linear(torch.ones(48, 32))
    seen: list[str] = []
    found = ops.measure_products(seen.append)
    assert seen == ["32x48 float32"]
    assert found == {"32x48 float32": "gemv to 2, flat to 32 rows"}
    table = Table.open(CHIP)
    stored = table.times[key_of(32, 48, "float32", "cpu")]["us"]
    assert {way: pytest.approx(cases) for way, cases in stored.items()} == RECORDED
    assert stale not in table.times, "times against torch were taken with other bounds"

    made = Ops.bind("cpu", CHIP, torch.float32, only=()).prepare_linear(torch.ones(48, 32))
    chip.ways.clear()
    for rows in ROWS:
        made(torch.ones(rows, 32))
    assert [way for way, _ in chip.ways] == ["gemv"] * 2 + ["flat"] * 4 + ["torch"] * 3


def test_a_chip_without_such_products_says_why():
    ops = Ops.bind("cpu", "x86-test", torch.float32, only=())
    with pytest.raises(registry.UnsupportedError, match=r"on x86-test: triton is for chips"):
        ops.measure_products(print)


def test_a_busy_machine_measures_nothing(ops, monkeypatch):
    monkeypatch.setattr(tune, "_BUSY_LOAD", -1.0)
    ops.prepare_linear(torch.ones(48, 32))
    with pytest.raises(tune.Busy, match="load"):
        ops.measure_products(lambda _: None)
    assert not any("ways" in key for key in Table.open(CHIP).times)
