"""`mxn train` from a job file to a model that the engine loads, with real ranks (forked ones)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mxn.cli.main import app
from mxn.cli.train_progress import step_line
from mxn.errors import ConfigError, MxnError, NotFoundError, UserError
from mxn.train.run import measure, session
from mxn.train.run.job import Job
from mxn.train.run.measure import Quality
from mxn.train.run.supervise.words import State
from support import tiny
from support.forked_start import quickly
from support.launches import group, small_job

ROOT = Path(__file__).parents[3]
JOB = """\
model: mxn-shakespeare-llama
data: {files: [text.txt]}
seq_tokens: 32
micro_batch: 1
global_batch: 4
steps: 3
checkpoint: {every_steps: 1}
gate: {speed: ignore}
devices:
  - {name: a, device: cpu}
  - {name: b, device: cpu}
"""


def mxn(*words: object):
    """Run a command in this process. Raises: what `main` would print, or a bug."""
    done = CliRunner().invoke(app, ["train", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A job file beside its text, a home of its own, and measurements that take no time."""
    folder = tmp_path_factory.mktemp("train")
    text = (ROOT / "recipes/data/tinyshakespeare.txt").read_text()[:4000]
    (folder / "text.txt").write_text(text)
    (folder / "job.yaml").write_text(JOB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MXN_HOME", str(folder / "home"))
        patch.setenv("COLUMNS", "100")
        patch.chdir(folder)
        quickly(patch)
        quick = Quality(blocks=3, block_s=0.02)
        patch.setattr(measure, "Quality", lambda **_: quick)
        yield folder


@pytest.fixture(scope="module")
def profiled(folder):
    return mxn("profile", "job.yaml")


@pytest.fixture(scope="module")
def trained(profiled, folder):
    """The run, and its lines of JSON."""
    done = mxn("run", "job.yaml", "--json")
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_profile_shows_what_was_measured_and_finds_it_again(profiled, folder):
    assert "block" in profiled.stdout
    assert "link a – b" in profiled.stdout
    assert "measured)" in profiled.stdout
    again = json.loads(mxn("profile", "job.yaml", "--json").stdout)
    assert again["is_reused"]
    (profile,) = again["profiles"]
    assert {reading["kind"] for reading in profile["readings"]} == {"embedding", "block", "head"}
    assert profile["basis"] == "measured"


def test_plan_says_what_it_decides_predicts_and_could_reach_at_most(profiled, folder):
    done = mxn("plan", "job.yaml", "--out", "plan.json", "--timeline", "step.svg")
    assert "mxn-shakespeare-llama" in done.stdout
    assert "tokens/s (measured" in done.stdout
    assert "upper bound:" in done.stdout
    assert (folder / "step.svg").read_text().startswith("<svg")
    told = json.loads(mxn("plan", "job.yaml", "--json", "--explain").stdout)
    best = told["best"]
    plan = json.loads((folder / "plan.json").read_text())
    assert plan == json.loads(json.dumps(best["plan"]))
    assert sum(p["micro_batches"] for p in plan["pipelines"]) == 4
    assert 0 < told["bounds"]["strict_ratio"] <= 1.001
    assert told["explanation"]["shares"]["useful"] > 0.1
    assert sum(told["explanation"]["shares"].values()) == pytest.approx(1, abs=0.02)


def test_simulate_draws_the_plan_that_was_written(profiled, folder):
    mxn("plan", "job.yaml", "--out", "plan.json")
    done = mxn("simulate", "plan.json", "job.yaml")
    assert "bubble" in done.stdout
    assert "F forward" in done.stdout
    told = json.loads(mxn("simulate", "plan.json", "job.yaml", "--json").stdout)
    ends = [span[2] for stage in told["stages"] for span in stage["spans"]]
    assert max(ends) == pytest.approx(told["prediction"]["iteration_s"], rel=1e-6)


def test_run_prints_each_step_with_its_predicted_time(trained):
    assert [line["step"] for line in trained] == [0, 1, 2]
    assert all(line["seconds"] > 0 and line["predicted_s"] > 0 for line in trained)
    assert trained[0]["num_steps"] == 3
    assert trained[-1]["loss"] < 8


def test_status_tells_how_the_run_ended(trained, folder):
    text = mxn("status").stdout
    assert "job  runs/job  done" in text
    assert "checkpoint step 3" in text
    assert json.loads(mxn("status", "runs/job", "--json").stdout)["phase"] == "done"


def test_a_finished_run_is_not_run_again(trained, folder):
    done = mxn("resume", "runs/job", "--json")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "all 3 steps are done" in done.stderr


@pytest.mark.parametrize(
    ("chosen", "used"), [("never", "newest"), ("newest", "newest"), ("intact", "intact")]
)
def test_resume_goes_on_with_a_run_that_was_to_begin_anew(tmp_path, monkeypatch, chosen, used):
    out = tmp_path / "out"
    job = small_job(out, 3, [group()])
    session.keep_job(replace(job, checkpoint=replace(job.checkpoint, resume=chosen)))
    begun: list[Job] = []

    def run_job(job, **_):
        begun.append(job)
        return State(groups=("all",), phase="done")

    monkeypatch.setattr(session, "run_job", run_job)
    assert mxn("resume", out).exit_code == 0
    assert [job.checkpoint.resume for job in begun] == [used]
    assert begun[0] == replace(job, checkpoint=replace(job.checkpoint, resume=used))


def test_export_writes_a_model_that_the_engine_loads(trained, folder):
    import torch

    from mxn.chips import find_device
    from mxn.models.load import load_model

    done = mxn("export", "runs/job", "--out", "model")
    assert done.stdout == "mxn serve model\n"
    loaded = load_model(folder / "model", find_device("cpu"), "float32")
    assert (loaded.family, loaded.unused_tensors) == ("llama", ())
    started = load_model(
        ROOT / "src/mxn/shipped/mxn-shakespeare-llama", find_device("cpu"), "float32"
    )
    assert loaded.num_parameters == started.num_parameters
    before, after = (m.model.layers[0].ffn.down for m in (started, loaded))
    assert (
        not torch.equal(before.weight_NK, after.weight_NK)
        if hasattr(before, "weight_NK")
        else str(before) != str(after)
    )
    with pytest.raises(ConfigError, match="exists already"):
        mxn("export", "runs/job", "--out", "model")
    with pytest.raises(NotFoundError, match="no checkpoint of step 9"):
        mxn("export", "runs/job", "--out", "other", "--step", 9)
    with pytest.raises(UserError, match="trains no adapter"):
        mxn("export", "runs/job", "--out", "other", "--adapter")


def test_drop_wants_a_job_that_runs_and_a_group_that_it_has(trained, folder):
    with pytest.raises(UserError, match="it is done"):
        mxn("drop", "runs/job", "a")
    with pytest.raises(UserError, match="no group 'c'"):
        mxn("add", "runs/job", "c")


CLUSTER = """\
default_link = { gb_per_s = 10 }
[[group]]
chip = "nvidia-h100"
devices = 2
devices_per_node = 2
[[group]]
chip = "nvidia-a100-80g"
devices = 2
devices_per_node = 2
"""


@pytest.fixture
def cluster(folder):
    (folder / "cluster.toml").write_text(CLUSTER)
    shutil.rmtree(folder / "config", ignore_errors=True)
    tiny.write("llama3", folder / "config")
    for path in (folder / "config").glob("*.safetensors"):
        path.unlink()
    return ("--model", "config", "--cluster", "cluster.toml", "--seq-tokens", 64)


def test_a_cluster_that_nobody_has_is_planned_from_data_sheets(cluster):
    told = json.loads(mxn("plan", *cluster, "--global-batch", 16, "--json").stdout)
    assert told["best"]["prediction"]["basis"] == "assumed"
    assert sum(p["micro_batches"] for p in told["best"]["plan"]["pipelines"]) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to plan for"),
        (("--model", "config"), "nothing to plan for"),
        (("job.yaml", "--cluster", "cluster.toml"), "a job says itself what --cluster"),
        (
            ("--model", "config", "--cluster", "nowhere.toml", "--seq-tokens", 64),
            "no cluster file 'nowhere.toml'",
        ),
        (("nowhere.yaml",), "nowhere.yaml"),
    ],
)
def test_what_cannot_be_planned_is_said(cluster, words, message):
    with pytest.raises(MxnError, match=message):
        mxn("plan", *words)


def test_options_that_mean_nothing_are_refused(cluster):
    with pytest.raises(ConfigError, match="'1,x' is no list"):
        mxn("plan", *cluster, "--micro-batch", "1,x")
    with pytest.raises(ConfigError, match=r"does not end in .svg"):
        mxn("plan", *cluster, "--timeline", "step.gif")
    with pytest.raises(UserError, match="65536 tokens in a row"):
        mxn("plan", "--model", "config", "--cluster", "cluster.toml", "--seq-tokens", 65536)
    with pytest.raises(ConfigError, match="without a job nothing is measured"):
        mxn("plan", *cluster, "--fresh")
    with pytest.raises(NotFoundError, match="no training job in 'config'"):
        mxn("resume", "config")
    with pytest.raises(NotFoundError, match="no plan file"):
        mxn("simulate", "nowhere.json", "job.yaml")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--micro-batch", "1,2"), ("--seq-tokens", 64), ("--global-batch", 8),
        ("--dtype", "float32"), ("--model", "config"),
    ],
)  # fmt: skip
def test_options_that_a_job_says_itself_are_refused_beside_one(folder, option, value):
    """They were passed over: the job's own went into the plan."""
    with pytest.raises(ConfigError, match=f"a job says itself what {option}"):
        mxn("plan", "job.yaml", option, value)


def test_a_plan_is_simulated_with_its_own_rows(cluster, folder):
    mxn("plan", *cluster, "--global-batch", 16, "--out", "wide.json")
    known = ("--model", "config", "--cluster", "cluster.toml")
    told = json.loads(mxn("simulate", "wide.json", *known, "--json").stdout)
    assert told["prediction"]["iteration_s"] > 0
    with pytest.raises(ConfigError, match="steps of 16 rows, not 8"):
        mxn("simulate", "wide.json", *known, "--global-batch", 8)
    with pytest.raises(ConfigError, match="a job says itself what --dtype"):
        mxn("simulate", "wide.json", "job.yaml", "--dtype", "float32")


def test_a_step_is_one_line():
    told = {
        "step": 9, "num_steps": 20, "loss": 2.5, "seconds": 1.1, "predicted_s": 1.0,
        "tokens_per_s": 930.0,
    }  # fmt: skip
    assert step_line(told) == (
        "step 10/20  loss 2.5000  1.1 s (predicted 1 s, +10.0%)  930 tokens/s  11 s left"
    )
