"""Commands as a user runs them: processes with a home of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support import tiny
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
    def run(*words: object, **options: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "mxn.cli.main", *map(str, words)]
        environment = os.environ | {"MXN_HOME": str(home), "COLUMNS": "80"}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, **options
        )

    return run
