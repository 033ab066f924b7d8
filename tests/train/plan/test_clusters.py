"""Cluster files: what they say, what the catalogue adds, and errors with line and nearest name."""

from __future__ import annotations

import pytest

from mxn.chips.specs import all_specs, parse
from mxn.errors import ConfigError
from mxn.train.plan.clusters import read_cluster
from mxn.train.plan.simulated import PRESETS, SIX_CHIPS, cluster_text

SPEC = """
name = "one"
title = "One"
vendor = "example"
torch_device = "cuda"
[[peak]]
dtype = "bf16"
tflop_per_s = 100
basis = "datasheet"
[[memory]]
bytes = 50000000000
basis = "datasheet"
[[link]]
gb_per_s = 200
basis = "datasheet"
"""
SPECS = {
    "one": parse(SPEC, "one.toml"),
    "bare": parse(SPEC.split("[[")[0].replace("one", "bare"), "bare.toml"),
}
GOOD = """\
default_link = { gb_per_s = 5, latency_us = 30 }

[[group]]
name = "left"
chip = "one"
devices = 16
devices_per_node = 8
group_link = { gb_per_s = 20 }
watts = 300
price_per_hour = 1.5

[[group]]
name = "right"
chip = "one"
devices = 4
devices_per_node = 4
memory = "40GiB"
peak_tflop_per_s = 90
node_link = { gb_per_s = 10, latency_us = 1, basis = "measured" }
"""


def read(text):
    return read_cluster(text, "pool.toml", SPECS)


def test_a_file_gives_groups_and_links_and_the_catalogue_fills_in():
    found = read(GOOD)
    left, right = found.cluster.groups
    assert (left.num_devices, left.num_nodes) == (16, 2)
    assert left.memory_bytes == int(50e9 * 0.92)
    assert left.peak_flop_per_s == 100e12
    assert left.node_link.bytes_per_s == 100e9  # half of what goes both ways
    assert (left.watts, left.price_micro_per_hour) == (300, 1_500_000)
    assert right.memory_bytes == 40 * 2**30
    assert right.node_link.basis == "measured"
    assert found.cluster.link("left", 0, "right", 0).latency_s == pytest.approx(30e-6)
    assert any("right: watts are unknown" in note for note in found.notes)
    assert right.watts is None


def test_the_catalogue_gives_watts_that_a_file_may_overrule():
    text = 'default_link = {gb_per_s = 1}\n[[group]]\nchip = "nvidia-h200"\ndevices = 8\n'
    text += "devices_per_node = 8\n"
    (group,) = read_cluster(text, "pool.toml", all_specs()).cluster.groups
    assert group.watts == 700
    (group,) = read_cluster(text + "watts = 560\n", "pool.toml", all_specs()).cluster.groups
    assert group.watts == 560


@pytest.mark.parametrize(
    ("old", "new", "line", "what"),
    [
        ("watts = 300", "wats = 300", 9, "did you mean 'watts'"),
        ('chip = "one"', 'chip = "onne"', 5, "did you mean 'one'"),
        ("devices = 4\n", "devices = 0\n", 15, "at least 1"),
        ('memory = "40GiB"', 'memory = "many"', 17, "cannot read 'many'"),
        ('name = "right"', 'name = "left"', 13, "two groups are named 'left'"),
        ("peak_tflop_per_s = 90", "peak_tflop_per_s = -1", 18, "more than 0"),
        ('basis = "measured"', 'basis = "measrued"', 19, "did you mean 'measured'"),
        ("group_link = { gb_per_s = 20 }\n", "", 6, "add group_link"),
        ("gb_per_s = 10,", "gb_per_sec = 10,", 19, "did you mean 'gb_per_s'"),
    ],
)
def test_a_mistake_is_shown_with_its_line_and_what_was_meant(old, new, line, what):
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        read(GOOD.replace(old, new, 1))
    assert f"pool.toml:{line}:" in str(caught.value)
    assert what in str(caught.value)


def test_a_link_names_groups_that_exist():
    with pytest.raises(ConfigError, match="did you mean 'right'"):
        read(GOOD + '\n[[link]]\nbetween = ["left", "rigth"]\ngb_per_s = 1\n')
    found = read(GOOD + '\n[[link]]\nbetween = ["right", "left"]\ngb_per_s = 1\n')
    assert found.cluster.link("left", 0, "right", 0).bytes_per_s == 1e9


def test_what_nobody_knows_is_asked_for_and_never_guessed():
    with pytest.raises(ConfigError, match="memory of 'bare' is unknown"):
        read('[[group]]\nchip = "bare"\ndevices = 1\ndevices_per_node = 1\n')
    found = read('[[group]]\nchip = "bare"\ndevices = 1\ndevices_per_node = 1\nmemory = "8GiB"\n')
    assert found.cluster.groups[0].peak_flop_per_s is None
    with pytest.raises(ConfigError, match="between 'left' and 'right' is not given"):
        read(GOOD.replace("default_link = { gb_per_s = 5, latency_us = 30 }", ""))


def test_text_that_is_no_toml_and_files_without_groups_are_refused():
    with pytest.raises(ConfigError, match="not valid TOML"):
        read("[[group]\n")
    with pytest.raises(ConfigError, match="no \\[\\[group\\]\\]"):
        read("")


@pytest.mark.parametrize(("name", "devices"), [("two-chips-768", 768), ("six-chips-1000", 1000)])
def test_presets_are_cluster_files_of_catalogued_chips(name, devices):
    found = read_cluster(PRESETS[name], name, all_specs())
    assert found.cluster.num_devices == devices
    for group in found.cluster.groups:
        assert group.group_link.basis == "assumed"
        assert group.peak_flop_per_s


def test_a_preset_can_be_scaled_in_whole_nodes():
    found = read_cluster(cluster_text(SIX_CHIPS, scale=10), "x", all_specs())
    assert found.cluster.num_devices == 10_000
    assert all(group.num_devices % 8 == 0 for group in found.cluster.groups)
