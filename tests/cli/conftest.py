"""Commands as a user runs them: processes with a home of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support import tiny
from support.forked_commands import run_mxn
from support.server import write_tokenizer

Mxn = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write("qwen3", folder)
    write_tokenizer(folder, tiny.VOCAB)
    return folder


@pytest.fixture
def home(tmp_path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture
def mxn(home) -> Mxn:
    def run(*words: object, input: str = "") -> subprocess.CompletedProcess:
        environment = os.environ | {"MXN_HOME": str(home), "COLUMNS": "80"}
        return run_mxn(list(map(str, words)), environment, input=input)

    return run
