"""A job file becomes a Job, or one error that names the line, the value and what is allowed."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.errors import ConfigError, MxnError, NotFoundError, UserError
from mxn.train.run.job import AdapterSettings, Job
from mxn.train.run.job_file import read_job

EXAMPLE = Path(__file__).parents[3] / "recipes" / "train" / "shakespeare.yaml"

LEAST = """\
model: mxn-shakespeare-llama
data: {files: text.txt}
seq_tokens: 64
micro_batch: 2
global_batch: 8
steps: 10
devices: [{name: a, device: cpu}]
"""


@pytest.fixture
def write(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be")

    def make(text: str) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return path

    return make


def test_the_example_is_a_job_and_its_data_is_there():
    job = read_job(EXAMPLE)
    assert [group.name for group in job.devices] == ["fast", "slow"]
    assert job.group("slow").memory_bytes == 2 * 2**30
    assert job.group("slow").link_bytes_per_s == 200e6
    assert job.micro_batches == 8
    assert job.optimizer.lr == 3e-4  # YAML 1.1 reads this as a word
    assert Path(job.data.files[0]).is_file()


def test_the_example_shows_every_key():
    from mxn.train.run.job_keys import KEYS

    text = EXAMPLE.read_text()
    assert [key for key in KEYS if not re.search(rf"\b{key}:", text)] == []


def test_what_is_not_said_has_a_default(write, tmp_path):
    job = read_job(write(LEAST), out=tmp_path / "run")
    assert job.name == "job"
    assert job.method == "pretrain"
    assert job.checkpoint.folder == str(tmp_path / "run" / "checkpoints")
    assert job.data.files == (str(tmp_path / "text.txt"),)


@pytest.mark.parametrize(
    ("text", "when", "rebalances"),
    [
        ("", "auto", True),
        ("rebalance: auto", "auto", True),
        ("rebalance: false", "never", False),
        ("rebalance: true", "always", True),
        ("rebalance: {every_steps: 20, least_gain: 0.02}", "always", True),
        ("plan: job.yaml", "auto", False),  # a plan file says the counts
        ("plan: job.yaml\nrebalance: {every_steps: 20}", "always", True),
        ("plan: {schedule: 1f1b}", "auto", True),
    ],
)
def test_micro_batches_are_shared_out_again_where_the_planner_chose_them(
    write, text, when, rebalances
):
    job = read_job(write(f"{LEAST}{text}\n"))
    assert (job.rebalance.when, job.rebalances) == (when, rebalances)
    assert job.rebalance.every_steps == (20 if "20" in text else 5)
    assert Job.from_json(job.to_json()) == job


def test_a_job_survives_json(write):
    job = read_job(write(LEAST + "method: lora\nlora: {targets: [q_proj]}\n"))
    assert Job.from_json(job.to_json()) == job
    assert job.lora == AdapterSettings(targets=("q_proj",))
    with pytest.raises(UserError, match="no training job"):
        Job.from_json('{"devices": [], "data": {"files": [], "colour": 1}}')


def test_the_fingerprint_is_of_what_is_learnt_and_not_of_where(write):
    job = read_job(write(LEAST))
    elsewhere = read_job(write(LEAST.replace("name: a", "name: b")))
    other = read_job(write(LEAST.replace("seq_tokens: 64", "seq_tokens: 32")))
    assert job.fingerprint == elsewhere.fingerprint != other.fingerprint


def test_a_model_may_begin_from_scratch(write):
    source = "{source: mxn-shakespeare-llama, begin: scratch}"
    job = read_job(write(LEAST.replace("mxn-shakespeare-llama", source, 1)))
    assert job.model.begin == "scratch"
    assert Path(job.model.source, "tokenizer.json").is_file()
    hub = read_job(write(LEAST.replace("mxn-shakespeare-llama", "Qwen/Qwen3-0.6B")))
    assert hub.model.source == "Qwen/Qwen3-0.6B"


WRONG = [
    ("steps: 10", "step: 10", r":6: unknown key 'step'; did you mean 'steps'\?"),
    ("steps: 10", "steps: ten", r":6: steps: 'ten' is no number"),
    ("steps: 10", "steps: 0", r":6: steps: 0 must be at least 1"),
    ("steps: 10", "steps: 1.5", r":6: steps: 1.5 must be a whole number"),
    ("steps: 10", "steps: true", r":6: steps: True is no number"),
    ("steps: 10", "steps: 10\nepochs: 2", r":6: give either steps or epochs, not both"),
    ("steps: 10", "", r"either steps or epochs, there is neither"),
    ("steps: 10", "steps: 10\nsteps: 11", r":7: steps is given twice, first in line 6"),
    ("global_batch: 8", "global_batch: 7", r":5: global_batch: 7 rows are no multiple of micro"),
    ("seq_tokens: 64", "", r"key 'seq_tokens' is missing"),
    ("text.txt", "no.txt", r":2: data.files: 'no.txt' is no file"),
    ("files: text.txt", "files: []", r":2: data.files: must not be empty"),
    ("files: text.txt", "file: text.txt", r"unknown key 'file' in data; did you mean 'files'"),
    ("device: cpu", "device: GPU 1", r":7: devices\[0\].device: 'GPU 1' is no device"),
    ("device: cpu", "device: cpu, count: 0", r"devices\[0\].count: 0 must be at least 1"),
    ("device: cpu", "device: cpu, memory: lots", r"memory: 'lots' is no size; examples: 16GiB"),
    ("device: cpu", "device: cpu, link: 3", r"link: 3 is no rate; example: 100MB/s"),
    ("device: cpu", "device: sim:0, cpu_share: 0.5", r"device 'sim:0' is no processor"),
    ("steps: 10", "steps: 10\nrebalance: often",
     r"rebalance: 'often' must be auto, true, false, or \{every_steps"),
    ("steps: 10", "steps: 10\nrebalance: {every: 3}", r"'every' in rebalance; .* 'every_steps'"),
    ("[{name: a, device: cpu}]", "all", r"devices: 'all' must be auto, or a list of groups"),
    ("[{name: a, device: cpu}]", "[{name: a, device: cpu}, {name: a, device: sim:0}]",
     r"has the name 'a', which another group has too"),
    ("[{name: a, device: cpu}]",
     "[{name: a, device: sim:0, count: 2}, {name: b, device: sim:1}]",
     r"give sim:1 to both 'a' and 'b'"),
    ("steps: 10", "steps: 10\nmethod: finetune", r":7: method: 'finetune' must be one of"),
    ("steps: 10", "steps: 10\nmethod: stf", r"did you mean 'sft'\?"),
    ("steps: 10", "steps: 10\nlora: {rank: 4}", r":7: lora: is given, but method is 'pretrain'"),
    ("steps: 10", "steps: 10\noptimizer: {lr: -1}", r":7: optimizer.lr: -1 must be more than 0"),
    ("steps: 10", "steps: 10\noptimizer: {betas: [0.9]}", r"needs two numbers, has 1"),
    ("steps: 10", "steps: 10\noptimizer: {warmup_steps: 11}", r"warmup_steps 11, more than"),
    ("steps: 10", "steps: 10\nplan: here.json", r":7: plan: 'here.json' is no file"),
    ("steps: 10", "steps: 10\nplan: {schedule: 2f2b}", r"plan.schedule: '2f2b' must be one of"),
    ("steps: 10", "steps: 10\ndata: 3", r":7: data is given twice, first in line 2"),
    ("steps: 10", "steps: [10", r":7: is no YAML"),
    ("steps: 10", "steps: !!python/name:os.system", r":6: steps: could not determine a"),
    ("mxn-shakespeare-llama", "{begin: scratch}", r":1: key 'source' in model is missing"),
    ("steps: 10", "steps: 10\nmodel: x\n", r":7: model is given twice"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "bad", "message"), WRONG, ids=[row[2] for row in WRONG])
def test_what_is_wrong_is_said_with_its_line(write, good, bad, message):
    assert good in LEAST
    with pytest.raises(ConfigError, match=message) as caught:
        read_job(write(LEAST.replace(good, bad, 1)))
    assert "job.yaml" in caught.value.message


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "3\n", "a: &x [*x]\n", "\x00", "{"])
def test_other_files_are_refused_and_nothing_else(write, text):
    with pytest.raises(MxnError, match=r"job\.yaml"):
        read_job(write(text))


@given(text=st.text(alphabet="model: data{}[],-&*!|>#\n\t'\"19ae", max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_text_brings_it_down(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.yaml"
        path.write_text(text)
        with pytest.raises(MxnError):
            read_job(path)


def test_no_file_is_said():
    with pytest.raises(NotFoundError, match="cannot be read"):
        read_job(Path("nowhere.yaml"))
