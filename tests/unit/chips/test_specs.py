"""Specs: every figure has a basis, unknown stays absent, and driver names find their chip."""

from __future__ import annotations

import pytest

from mxn.chips import registry, specs
from mxn.errors import InternalError, NotFoundError

GB = 10**9


def test_all_specs_parse_and_are_named_after_their_file():
    from pathlib import Path

    files = {path.stem for path in Path(specs.__file__).parent.glob("*.toml")}
    assert files == set(specs.all_specs())
    assert len(files) > 50


def test_patterns_belong_to_known_vendors_and_torch_types():
    chips = {p.chip.vendor: p.chip for p in registry.plugins() if p.chip}
    for spec in specs.all_specs().values():
        if spec.vendor in chips:
            assert spec.torch_device == chips[spec.vendor].torch_type, spec.name


@pytest.mark.parametrize(
    ("vendor", "device", "memory", "chip"),
    [
        ("nvidia", "NVIDIA H200", 141 * GB, "nvidia-h200"),
        ("nvidia", "NVIDIA H100 80GB HBM3", 80 * GB, "nvidia-h100"),
        ("nvidia", "NVIDIA H100 PCIe", 80 * GB, None),
        ("nvidia", "NVIDIA A100-SXM4-80GB", 80 * GB, "nvidia-a100-80g"),
        ("nvidia", "NVIDIA H20", 96 * GB, "nvidia-h20"),
        ("nvidia", "NVIDIA H20", 141 * GB, None),
        ("nvidia", "NVIDIA L40S", 48 * GB, None),
        ("nvidia", "NVIDIA GeForce RTX 2080 Ti", 11 * GB, None),
        ("nvidia", "Tesla T4", 16 * GB, "nvidia-t4"),
        ("ascend", "Ascend910B3", 64 * GB, "ascend-910b3"),
        ("ascend", "910B1", 64 * GB, "ascend-910b"),
        ("hygon", "K100_AI", 64 * GB, "hygon-k100-ai"),
        ("hygon", "K100", 64 * GB, "hygon-k100"),
        ("kunlunxin", "P800 OAM", 96 * GB, "kunlunxin-p800"),
        ("enflame", "Enflame S60G", 24 * GB, None),
        ("nvidia", "P800 OAM", None, None),
    ],
)
def test_a_driver_name_finds_its_chip_and_no_relative(vendor, device, memory, chip):
    found = specs.match(vendor, device, memory)
    assert (found and found.name) == chip


def test_a_measured_figure_never_becomes_the_bound():
    spec = specs.load("ascend-910b")
    assert [f.basis for f in spec.all("fp16")] == ["measured"]
    assert spec.best("fp16") is None


def test_the_most_trusted_basis_wins_and_is_shown():
    spec = specs.load("hygon-bw200")
    assert (spec.best("fp16").value, spec.best("fp16").basis) == (480.0, "datasheet")
    assert (specs.load("nvidia-h200").best("fp16").basis) == "derived"
    assert specs.load("kunlunxin-p800").best("fp16").basis == "assumed"


def test_bf16_figures_are_not_sold_as_fp16():
    assert specs.load("gaudi-2").best("fp16") is None
    assert specs.load("gaudi-2").best("bf16").value == 432
    stated = {
        f.what: f.value for f in specs.load("iluvatar-bi-v150").figures if f.unit == "TFLOP/s"
    }
    assert stated == {"bf16": 196.8, "fp16": 196.5}


def test_an_unknown_chip_is_refused():
    with pytest.raises(NotFoundError, match="nothing is known about chip 'acme-1'"):
        specs.load("acme-1")


@pytest.mark.parametrize(
    ("peak", "error"),
    [
        ('dtype = "fp16"\ntflop_per_s = 1\nbasis = "guess"', "basis 'guess' is none of datasheet"),
        ('dtype = "fp16"\nbasis = "datasheet"', r"\[\[peak\]\] has none of tflop_per_s"),
        ('tflop_per_s = 1\nbasis = "datasheet"', "dtype"),
    ],
)
def test_a_spec_that_breaks_the_format_is_refused_by_name(peak, error):
    head = 'name = "x"\ntitle = "X"\nvendor = "x"\ntorch_device = "cpu"\n[[peak]]\n'
    with pytest.raises(InternalError, match=f"x.toml: .*{error}"):
        specs.parse(head + peak, "x.toml")
