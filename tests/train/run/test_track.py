"""Metrics are in the file whatever happens, and in MLflow where it is asked for."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from mxn.errors import UnsupportedError, UserError
from mxn.train.run.job import TrackingSettings
from mxn.train.run.track import Tracker, read_metrics

HAS_MLFLOW = importlib.util.find_spec("mlflow") is not None
needs_mlflow = pytest.mark.skipif(not HAS_MLFLOW, reason="needs the extra `train` (mlflow)")


def test_every_step_is_a_line_at_once(tmp_path):
    tracker = Tracker(tmp_path, TrackingSettings(), name="x")
    tracker.step(0, {"loss": 2.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 2.5}]
    tracker.artifact("plan.json")  # nobody to give it to
    tracker.close()


def test_steps_that_are_done_again_are_not_told_twice(tmp_path):
    tracker = Tracker(tmp_path, TrackingSettings(), name="x")
    for step in range(5):
        tracker.step(step, {"loss": 1.0})
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed here
    again = Tracker(tmp_path, TrackingSettings(), name="x", first_step=3)
    again.step(3, {"loss": 2.0})
    again.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 1), (1, 1), (2, 1), (3, 2)]


def test_tracking_without_the_package_is_an_error_that_says_how(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # importing it fails as if it were not there
    with pytest.raises(UnsupportedError, match=r"mlflow is not installed[\s\S]*mxn\[train\]"):
        Tracker(tmp_path, TrackingSettings(mlflow="http://127.0.0.1:1"), name="x")


@needs_mlflow
def test_a_server_that_is_not_there_is_said_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match="cannot be used"):
        Tracker(tmp_path, TrackingSettings(mlflow="http://127.0.0.1:9"), name="x")


@needs_mlflow
def test_mlflow_has_params_metrics_and_texts_and_a_resumed_run_goes_on(tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/m.db"
    settings = TrackingSettings(mlflow=uri, experiment="e")
    tracker = Tracker(tmp_path, settings, name="x")
    (tmp_path / "plan.json").write_text("{}")
    tracker.artifact("plan.json")
    tracker.artifact("nothing.txt")
    tracker.params({"lr": 1e-3, "optimizer": {"eps": 1e-8}})
    tracker.step(0, {"loss": 2.5, "mfu": None})
    tracker.close("KILLED")
    tracker = Tracker(tmp_path, settings, name="x", first_step=1)
    tracker.step(1, {"loss": 2.0})
    tracker.close()
    client = MlflowClient(tracking_uri=uri, registry_uri="")
    run = client.get_run(json.loads((tmp_path / "mlflow.json").read_text())["run"])
    assert run.data.params == {"lr": "0.001", "optimizer.eps": "1e-08"}
    assert run.info.status == "FINISHED"
    assert [found.path for found in client.list_artifacts(run.info.run_id)] == ["plan.json"]
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(0, 2.5), (1, 2.0)]
    experiments = client.search_experiments()
    assert len(client.search_runs([e.experiment_id for e in experiments])) == 1
