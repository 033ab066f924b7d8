"""From a job file to rows and settings: the same ones for every rank, broken lines counted."""

from __future__ import annotations

import json
import logging

import pytest

from mxn.errors import UserError
from mxn.train.run.from_job import facts, open_job
from mxn.train.run.job_file import read_job


@pytest.fixture
def write(tmp_path):
    def make(num_broken: int, more: str = "steps: 7") -> object:
        lines = [json.dumps({"text": f"To be, or not to be, {n}."}) for n in range(50)]
        for n in range(num_broken):
            lines.insert(7 * n, '{"text": "cut short')
        (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
        path = tmp_path / "job.yaml"
        path.write_text(f"""
model: mxn-shakespeare-llama
data: {{files: data.jsonl, max_broken: 0.1}}
seq_tokens: 16
micro_batch: 2
global_batch: 8
{more}
devices: auto
optimizer: {{lr: 1e-3, betas: [0.8, 0.9], clip: null, floor: 0.5}}
""")
        return read_job(path, out=tmp_path / "out")

    return make


def test_settings_are_the_jobs(write):
    opened = open_job(write(0))
    settings = opened.settings
    assert (opened.num_steps, settings.micro_batches, settings.clip_norm) == (7, 4, None)
    assert (settings.adam.beta1, settings.adam.beta2) == (0.8, 0.9)
    assert (settings.schedule.peak, settings.schedule.floor) == (1e-3, 0.5)
    assert opened.rows.micro_batch(0).ids.shape == (2, 16)


def test_epochs_become_steps(write):
    opened = open_job(write(0, "epochs: 2"))
    assert opened.num_steps == -(-2 * opened.rows.rows_per_epoch // 8)


def test_two_ranks_see_the_same_rows_and_say_so(write):
    first, second = open_job(write(0)), open_job(write(0))
    assert facts(write(0), first) == facts(write(0), second)
    assert (first.rows.micro_batch(5).ids == second.rows.micro_batch(5).ids).all()


def test_a_few_broken_lines_are_counted_and_left_out(write, caplog):
    with caplog.at_level(logging.WARNING):
        opened = open_job(write(2))
    assert opened.rows.cache.num_documents == 50
    assert "2 broken lines are left out (3.8 %): " in caplog.text
    assert "data.jsonl:1" in caplog.text


def test_many_broken_lines_stop_the_job_and_show_where(write):
    with pytest.raises(UserError, match=r"6 lines of the data are broken \(11 %\), more than") as c:
        open_job(write(6))
    assert "data.jsonl:1" in c.value.message
    assert "max_broken" in c.value.hint
