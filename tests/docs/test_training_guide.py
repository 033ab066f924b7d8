"""The training guide: its job is read, its cluster is planned for, its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from mxn.chips.specs import all_specs
from mxn.cli.main import app
from mxn.train.plan.clusters import read_cluster
from mxn.train.run.job_file import read_job

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs/guides/training.md").read_text(encoding="utf-8")
JOB = ROOT / "recipes/train/two-chips.yaml"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return lines + [text for text in re.findall(r"`(mxn train [^`]+)`", GUIDE) if "…" not in text]


def test_its_job_is_the_recipe_and_can_be_read():
    (job,) = blocks("yaml")
    assert JOB.read_text(encoding="utf-8").endswith(job)
    assert [group.device for group in read_job(JOB).devices] == ["cpu", "sim:0"]


def test_its_cluster_file_can_be_read():
    (cluster,) = blocks("toml")
    found = read_cluster(cluster, "the guide", all_specs()).cluster
    assert [group.num_devices for group in found.groups] == [8, 16]


@pytest.mark.parametrize("line", commands())
def test_its_commands_and_options_exist(line):
    program, *words = shlex.split(line)
    assert program == "mxn"
    command = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    options = {name for parameter in command.params for name in parameter.opts}
    unknown = [word for word in words if word.startswith("--") and word not in options]
    assert not unknown, f"{line}: no option {unknown}; there are {sorted(options)}"
    is_group = bool(getattr(command, "commands", None))
    assert not is_group or command.invoke_without_command, f"{line} names no command"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"recipes/train/[\w.-]+", GUIDE))))
def test_the_recipes_it_names_can_be_read(path):
    read_job(ROOT / path)
