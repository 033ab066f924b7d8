"""Plug-ins are found through entry points; a bad one stops nobody."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from mxn.chips import registry
from mxn.errors import NotFoundError

CPU = "mxn.chips.vendors.cpu:CpuChip"


def point(name, value):
    return EntryPoint(name, value, registry.GROUP)


def test_every_plug_in_of_this_project_loads_and_no_two_share_a_vendor():
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    ours = tomllib.loads(text)["project"]["entry-points"][registry.GROUP]
    loaded = registry.load_plugins(point(name, value) for name, value in ours.items())
    assert {p.name: p.error for p in loaded} == dict.fromkeys(ours, None)
    vendors = [p.chip.vendor for p in loaded]
    assert len(set(vendors)) == len(vendors)
    assert set(ours) <= {p.name for p in registry.plugins()}, "stale install: pip install -e ."


def test_the_same_entry_point_twice_counts_once():
    loaded = registry.load_plugins([point("cpu", CPU), point("cpu", CPU)])
    assert [(p.name, p.error) for p in loaded] == [("cpu", None)]


@pytest.mark.parametrize(
    ("points", "error"),
    [
        ([point("a", "no_such_package:Chip")], "ModuleNotFoundError: No module named"),
        ([point("a", "mxn.chips.vendors.cpu:Nothing")], "AttributeError"),
        ([point("a", "pathlib:PurePath")], "is not a mxn.chips.chip.Chip"),
        ([point("a", CPU), point("a", "other:Chip")], "two plug-ins are named 'a'"),
    ],
    ids=["absent", "no-class", "no-chip", "two"],
)
def test_a_bad_plug_in_is_kept_with_its_error_beside_the_good_ones(points, error):
    bad, good = registry.load_plugins([*points, point("cpu", CPU)])
    assert bad.chip is None
    assert error in bad.error
    assert good.chip is not None


def test_an_unknown_vendor_is_refused_with_the_known_ones():
    with pytest.raises(NotFoundError, match=r"'acme'; there are: .*nvidia"):
        registry.chip_of("acme")
