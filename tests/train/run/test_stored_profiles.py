"""Measured profiles come back as they were stored; a damaged file is named, never used."""

from __future__ import annotations

import json

import pytest

from mxn.errors import ConfigError
from mxn.train.plan.cluster import Link
from mxn.train.plan.profile import LayerCost
from mxn.train.run import stored
from mxn.train.run.stored import Reading, StoredLink, StoredProfile

KEY = {"chip": "x86", "threads": 1, "cpu_share": 0.5, "dtype": "float32"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MXN_HOME", str(tmp_path))
    return tmp_path


def reading(kind: str = "block", micro_batch: int = 2, forward_s: float = 0.01) -> Reading:
    cost = LayerCost(
        forward_s=forward_s, backward_s=0.02, optimizer_s=0.001, weight_s=0.009,
        activation_bytes=4096.0,
    )  # fmt: skip
    return Reading(kind=kind, micro_batch=micro_batch, tp=1, cost=cost, noise=0.01, repeats=7)


def profile(*readings: Reading) -> StoredProfile:
    return StoredProfile(
        chip="x86@0.5", key=KEY, readings=readings or (reading(),), framework_bytes=2e8,
        basis="simulated", notes=("half a core",),
    )  # fmt: skip


def test_a_profile_comes_back_as_it_was_stored():
    before = profile(reading(), reading("head"))
    stored.store_layers(before)
    after = stored.load_layers(KEY)
    assert after == before
    assert after.to_chip_profile().layer("head", 2, 1).backward_s == 0.02


def test_a_link_comes_back_as_it_was_stored():
    link = Link(latency_s=1e-4, bytes_per_s=1e9, points=((1024.0, 1e-4), (2048.0, 2e-4)))
    before = StoredLink(key={"ends": ["a", "b"]}, link=link, noise=0.1)
    stored.store_link(before)
    assert stored.load_link({"ends": ["a", "b"]}) == before


def test_nothing_is_stored_for_other_conditions():
    stored.store_layers(profile())
    assert stored.load_layers(KEY | {"cpu_share": 0.25}) is None
    assert stored.load_link(KEY) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("0.02", "0.03"),
        lambda text: text.replace(stored.SCHEMA, "mxn.train.profile/0"),
        lambda text: "[]",
        lambda text: "",
    ],
    ids=["cut", "changed", "old", "foreign", "empty"],
)
def test_a_damaged_file_is_an_error_that_names_it(damage):
    path = stored.store_layers(profile())
    path.write_text(damage(path.read_text()))
    with pytest.raises(ConfigError, match="cannot read the stored profile") as error:
        stored.load_layers(KEY)
    assert str(path) in error.value.message
    assert "--fresh" in str(error.value)


def test_a_whole_file_with_other_fields_is_an_error_too():
    path = stored.store_layers(profile())
    body = json.loads(path.read_text())["body"]
    del body["readings"][0]["noise"]
    stored._write(path, body)
    with pytest.raises(ConfigError, match="noise"):
        stored.load_layers(KEY)


def test_new_readings_come_beside_those_that_are_there():
    before = profile(reading(), reading(micro_batch=4))
    more = (reading(forward_s=0.5), reading("head"))
    found = before.with_readings(more).readings
    cases = {(r.kind, r.micro_batch): r.cost.forward_s for r in found}
    assert cases == {("block", 2): 0.01, ("block", 4): 0.01, ("head", 2): 0.01}
    assert before.lacks({("block", 2, 1), ("head", 2, 1)}) == {("head", 2, 1)}
