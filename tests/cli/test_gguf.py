"""A GGUF file as the model of `mxn run` and `mxn serve`: nothing but the file is needed."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import pytest

from mxn.cli.serve import _served_name
from support.server import serving

GOLDEN = Path(__file__).parents[1] / "parity" / "golden" / "gguf"


def test_a_gguf_file_runs_greedily_and_the_same_each_time(mxn):
    words = ("run", GOLDEN / "qwen2.gguf", "the model", "--max-tokens", 4, "--temperature", 0)
    first, second = mxn(*words), mxn(*words)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout != ""


def test_a_folder_with_a_gguf_file_is_served_with_its_chat_template(tmp_path, home):
    (tmp_path / "folder").mkdir()
    shutil.copy(GOLDEN / "qwen2.gguf", tmp_path / "folder" / "small.Q4_0.gguf")
    with serving(tmp_path / "folder", home) as url:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}],
                "max_tokens": 3}  # fmt: skip
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
    assert answer["usage"]["prompt_tokens"] == 2  # the template of the file adds nothing
    assert answer["usage"]["completion_tokens"] >= 1


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("models/small.Q4_0.gguf", "small.Q4_0"),
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("/data/plain-folder/", "plain-folder"),
    ],
)
def test_callers_use_the_last_part_of_the_model_without_gguf(model, name):
    assert _served_name(model) == name


@pytest.mark.parametrize("content", [b"", b"GGUF\x03", b"not one"])
def test_a_broken_gguf_file_is_one_line(mxn, tmp_path, content):
    (tmp_path / "broken.gguf").write_bytes(content)
    done = mxn("run", tmp_path / "broken.gguf", "hi")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "broken.gguf" in done.stderr
    assert "Traceback" not in done.stderr
