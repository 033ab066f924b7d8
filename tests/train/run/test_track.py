"""Metrics are in the file whatever happens, and in MLflow where it is asked for."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import traceback
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest

from mxn.errors import ConfigError, UnsupportedError, UserError
from mxn.train.run import launch, session, track
from mxn.train.run.gate import process as gate
from mxn.train.run.job import TrackingSettings
from mxn.train.run.job_file import read_job
from mxn.train.run.login import (
    PASSWORD,
    USER,
    hide_login,
    take_login,
    with_login,
    without_login,
)
from mxn.train.run.supervise.ranks import Launching
from mxn.train.run.supervise.shell import Supervisor
from mxn.train.run.track import Tracker, read_metrics
from support.launches import group
from support.one_rank import one_stage_plan

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


@contextmanager
def files_of_at_most(num_bytes: int):
    """Writes beyond it fail, in part or whole, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, caplog):
    tracker = Tracker(tmp_path, TrackingSettings(), name="x")
    tracker.step(0, {"loss": 1.0})
    os.utime(tracker.path, (0, 0))
    with files_of_at_most(tracker.path.stat().st_size + 5):
        tracker.step(1, {"loss": 1.0})
        tracker.step(2, {"loss": 1.0})
    assert tracker.path.stat().st_mtime > 0  # a sign of life, or its supervisor takes it for stuck
    tracker.step(3, {"loss": 1.0})
    tracker.close()
    assert [row["step"] for row in read_metrics(tracker.path)] == [0, 3]
    said = [record for record in caplog.records if "cannot be written" in record.message]
    assert len(said) == 1


def test_tracking_without_the_package_is_an_error_that_says_how(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # importing it fails as if it were not there
    with pytest.raises(UnsupportedError, match=r"mlflow is not installed[\s\S]*mxn\[train\]"):
        Tracker(tmp_path, TrackingSettings(mlflow="http://127.0.0.1:1"), name="x")


@needs_mlflow
def test_a_server_that_is_not_there_is_said_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # they take seconds
    with pytest.raises(UserError, match="cannot be used"):
        Tracker(tmp_path, TrackingSettings(mlflow="http://127.0.0.1:9"), name="x")


@needs_mlflow
def test_mlflow_has_params_metrics_and_texts_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # beside a database, MLflow keeps files where the command runs
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


# -- names and passwords ---------------------------------------------------------------------------

SECRET = "s3cret:/@word"


@pytest.fixture
def login(monkeypatch):
    monkeypatch.setenv(USER, "")  # so that what a test sets is forgotten behind it
    monkeypatch.setenv(PASSWORD, "")
    monkeypatch.delenv(USER)
    monkeypatch.delenv(PASSWORD)


@pytest.mark.parametrize("scheme", ["http", "https", "postgresql"])
def test_a_name_and_a_password_leave_the_address_and_come_back_from_memory(login, scheme):
    uri = f"{scheme}://ann:{quote(SECRET, safe='')}@host:5000/path?x=1"
    shown = take_login(uri)
    assert shown == f"{scheme}://***@host:5000/path?x=1"
    assert (os.environ[USER], os.environ[PASSWORD]) == ("ann", SECRET)
    assert take_login(shown) == shown
    if scheme == "postgresql":
        assert with_login(shown) == uri
    else:  # MLflow takes both from the variables: its own messages show the address
        assert with_login(shown) == f"{scheme}://host:5000/path?x=1"


def test_a_resumed_job_without_its_password_says_what_to_set(login):
    with pytest.raises(UserError, match=f"host:5000 .*not stored[\\s\\S]*{USER} and {PASSWORD}"):
        with_login("http://***@host:5000")


UNCLEAR = [
    "http://ann:a/pa55@host",
    "postgresql://host/db?password=pa55",
    "ann:pa55@host:5000",
    "http:ann:pa55@host",
    "http://ann:12/pa55@host",
    "http://ann:12#pa55@host",
    "http://ann:12?pa55@host",
    "http://tok/pa55@host",
    "http://ann:a@b/pa55@host",
]


@pytest.mark.parametrize("uri", UNCLEAR)
def test_a_secret_that_cannot_be_told_from_the_rest_is_refused_without_it(login, uri):
    with pytest.raises(ConfigError) as caught:
        take_login(uri)
    assert "pa55" not in str(caught.value)
    assert PASSWORD in str(caught.value)


def test_addresses_without_a_login_stay_as_they_are(login):
    files = ("sqlite:////tmp/a@b.db", "sqlite+pysqlite:///a@b.db", "file:///tmp/a@b")
    for uri in ("http://host:5000", "http://host/a%40b", "databricks", "runs/x", *files):
        assert with_login(take_login(uri)) == uri
    assert USER not in os.environ


def job_file(folder, tracking: str):
    (folder / "text.txt").write_text("x")
    path = folder / "job.yaml"
    path.write_text(f"""
model: mxn-shakespeare-llama
data: {{files: text.txt}}
seq_tokens: 16
global_batch: 1
steps: 1
devices: auto
tracking: {tracking}
""")
    return path


@pytest.mark.parametrize(
    "tracking",
    [
        *(f'{{mlflow: "{uri}"}}' for uri in UNCLEAR),
        "http://ann:pa55@host",  # the mapping was forgotten
        "ann:pa55@host",
        "{http://ann:pa.pa55@host}",
        "{ann:pa55@host}",
        '{"http://ann:pa55@host": 1, "http://ann:pa55@host": 2}',
    ],
)
def test_no_error_about_a_job_file_shows_a_password(login, tmp_path, tracking):
    with pytest.raises(ConfigError, match="tracking") as caught:
        read_job(job_file(tmp_path, tracking))
    assert "pa55" not in "".join(traceback.format_exception(caught.value))


def test_no_job_holds_a_password(login, tmp_path):
    job = read_job(job_file(tmp_path, '{mlflow: "http://ann:pa55word@host"}'))
    assert job.tracking.mlflow == "http://***@host"
    assert "pa55word" not in job.to_json()
    assert os.environ[PASSWORD] == "pa55word"
    by_hand = replace(job, tracking=TrackingSettings(mlflow="http://ann:other@host"))
    assert hide_login(by_hand) == job


def test_texts_lose_logins(login, monkeypatch):
    said = "cannot reach http://ann:pw@host/api (at ann:pa55word)"
    monkeypatch.setenv(PASSWORD, "pa55word")
    assert without_login(said) == "cannot reach http://***@host/api (at ann:***)"


@needs_mlflow
def test_a_password_is_in_no_error_of_a_server(login, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # they take seconds
    uri = "http://ann:pa55word@127.0.0.1:9"
    with pytest.raises(UserError, match="cannot be used") as caught:
        Tracker(tmp_path, TrackingSettings(mlflow=uri), name="x")
    assert "pa55word" not in "".join(traceback.format_exception(caught.value))


@needs_mlflow
def test_a_password_is_not_kept_beside_the_run(login, tmp_path, monkeypatch):
    """A database stands for the server, which would take the login from the variables."""
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(track, "with_login", lambda shown: f"sqlite:///{tmp_path}/m.db")
    Tracker(out, TrackingSettings(mlflow="http://ann:pa55word@host"), name="x").close()
    assert json.loads((out / "mlflow.json").read_text())["uri"] == "http://***@host"
    assert all("pa55word" not in path.read_text() for path in out.rglob("*"))


def test_a_password_is_in_nothing_that_a_run_hands_on(login, tmp_path, monkeypatch):
    """Of a job made by hand: its address was not looked at by the reader of job files."""
    written = []

    class Started(Exception):
        pass

    def start(command, *_, **__):
        written.append(Path(command[-1]).read_text())  # a rank's spec, the gate's request
        raise Started

    def run(supervisor):
        job = supervisor.job
        plan = one_stage_plan(job, 6, "a")
        launching = Launching(
            job=job, plan=plan, launch=1, resume_step=None, log_folder=tmp_path
        )  # fmt: skip
        with pytest.raises(Started):
            launch.launch(launching)
        with pytest.raises(Started):
            gate.check_group(job, job.devices[0])
        return supervisor.state

    monkeypatch.setattr(Supervisor, "run", run)
    monkeypatch.setattr(launch, "start_process", start)
    monkeypatch.setattr(gate.subprocess, "run", start)
    job = read_job(job_file(tmp_path, "{}"), out=tmp_path / "out")
    tracking = TrackingSettings(mlflow="http://ann:pa55word@host")
    session.run_job(replace(job, devices=(group("a"),), tracking=tracking))
    written.append((tmp_path / "out" / "job.json").read_text())
    assert len(written) == 3
    assert all("http://***@host" in text and "pa55word" not in text for text in written)
