"""The measured dataflow and the calibrated maximum: stored, read again, refused when busy."""

from __future__ import annotations

import json

import pytest
import torch

from mxn.chips import find_device
from mxn.kernels import tune
from mxn.kernels.native import dataflow, formats, missing_reason
from mxn.kernels.native.pack import pack
from mxn.models.load import load_model
from mxn.models.native import calibrate, settle
from support import tiny
from support.paged import Session

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))

PROMPT = list(range(3, 40))


def times(flat: list[float], tiled: list[float]) -> tune.Times:
    rows = [f"M={rows}" for rows in dataflow.ROWS]
    return {
        "flat": dict(zip(rows, flat, strict=True)),
        "tiled": dict(zip(rows, tiled, strict=True)),
    }


@pytest.mark.parametrize(
    ("tiled", "want"),
    [
        ([9, 9, 9], dataflow.ROWS[0]),
        ([11, 9, 9], dataflow.ROWS[1]),
        ([9, 11, 9], dataflow.ROWS[2]),  # a gain below a loss is noise
        ([9, 9, 11], dataflow.NEVER),
        ([10, 10, 10], dataflow.NEVER),  # nothing gained: the simpler way
    ],
)
def test_tiling_begins_where_it_wins_from_there_on(tiled, want):
    assert dataflow.threshold(times([10, 10, 10], tiled)) == want


def test_a_shape_is_measured_once_and_then_read(tmp_path, monkeypatch):
    monkeypatch.setenv("MXN_HOME", str(tmp_path))
    monkeypatch.setenv("MXN_KERNEL_TUNING", "on")
    monkeypatch.setattr(dataflow, "busy_reason", lambda: None)
    calls = []
    measured = times([10, 10, 10], [11, 9, 9])
    monkeypatch.setattr(dataflow, "measure", lambda *a: calls.append(a) or measured)
    weight = pack(torch.ones(32, 64), formats.parse_weights("int8"))
    for reason in ("measured here", "measured before"):
        found = dataflow.tiled_from(weight, settle.table(), 1)
        assert found == (dataflow.ROWS[1], reason)
    assert len(calls) == 1


def test_a_busy_machine_gets_the_default_and_stores_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MXN_HOME", str(tmp_path))
    monkeypatch.setenv("MXN_KERNEL_TUNING", "on")
    monkeypatch.setattr(dataflow, "busy_reason", lambda: "load 9.0 on 2 cores")
    weight = pack(torch.ones(32, 64), formats.parse_weights("int4"))
    rows, reason = dataflow.tiled_from(weight, settle.table(), 1)
    assert rows == dataflow.NEVER
    assert "load 9.0" in reason
    assert not settle.table().times


def test_both_ways_are_really_timed():
    weight = pack(torch.randn(64, 128), formats.parse_weights("int8"))
    before = weight.handle.tiled_from
    try:
        found = dataflow.measure(weight, 1)
    except tune.Busy:
        pytest.skip("the machine is too busy to time anything")
    assert set(found) == {"flat", "tiled"}
    assert all(us > 0 for case in found.values() for us in case.values())
    assert weight.handle.tiled_from == before


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("MXN_HOME", str(tmp_path / "home"))
    tiny.write("llama2", tmp_path / "model")
    format = formats.parse("f32")
    return load_model(
        tmp_path / "model", find_device("cpu"), "float32", format=format, num_threads=1
    ).model


def test_a_calibration_covers_what_it_saw_and_changes_no_logits(model):
    want = Session(model).step({0: PROMPT})[0]
    maxima = calibrate.calibrate(model, [PROMPT])
    assert len(maxima) == len(model.spec.layers)
    for maximum in maxima:
        assert maximum.low <= maximum.phi <= maximum.high
        assert maximum.rows == len(PROMPT) * model.spec.layers[0].attention.num_heads
    assert "calibrated" in settle.use_maxima(model, maxima)
    got = Session(model).step({0: PROMPT})[0]
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert model.num_recomputed == 0


def test_a_range_that_is_too_wide_leaves_each_row_its_own_maximum():
    wide = calibrate._maximum(-90.0, 40.0, 5)
    assert (wide.phi, wide.margin) == (0.0, 0.0)
    assert calibrate._maximum(-4.0, 6.0, 5).phi == 1.0


def test_a_calibration_is_stored_by_the_weights_it_was_made_for(model):
    config = {"hidden_size": 48}
    name = calibrate.fingerprint(config, model)
    assert calibrate.stored(name) is None
    maxima = calibrate.calibrate(model, [PROMPT])
    path = calibrate.store(name, maxima, prompts="a test")
    assert calibrate.stored(name) == maxima
    assert json.loads(path.read_text())["prompts"] == "a test"
    assert calibrate.fingerprint(config | {"hidden_size": 64}, model) != name
    path.write_text("{")
    assert calibrate.stored(name) is None


def test_nothing_to_calibrate_on_is_refused(model):
    with pytest.raises(ValueError, match="at least one prompt"):
        calibrate.calibrate(model, [[]])
