"""A real `mxn serve` process on a free loopback port, for tests from the outside.

It is forked from one that has the imports behind it, or started as a shell does (`is_real`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from support.forked_commands import start_mxn
from support.forks import ForkedProcess

START_LIMIT_S = 120.0


Process = ForkedProcess | subprocess.Popen[bytes]


@contextmanager
def serving(
    model: Path, home: Path, *options: str, name: str = "tiny", is_real: bool = False
) -> Iterator[str]:
    """Serve `model` under `name`; yield the base URL when it is ready."""
    words = ["serve", str(model), "--name", name, "--port", "0", "--threads", "1", *options]
    log = home / "serve.log"
    with _started(words, {"MXN_HOME": str(home)}, log, is_real, 60) as process:
        yield _wait_until_ready(process, log)


@contextmanager
def gateway_process(
    home: Path, *options: str, is_real: bool = False
) -> Iterator[tuple[str, Process, Path]]:
    """Run `mxn gateway`; yield its URL, its process and the file with all it says."""
    log = home / "gateway.log"
    environment = {"MXN_HOME": str(home), "MXN_LOG": "debug"}
    words = ["gateway", "--port", "0", *options]
    with _started(words, environment, log, is_real, 20) as process:
        while (url := _announced(log)) is None:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield url, process, log


@contextmanager
def _started(
    words: list[str], more: dict[str, str], log: Path, is_real: bool, end_limit_s: float
) -> Iterator[Process]:
    """Run a command until the end of the block; it must end when it is told to."""
    process = (_start_in_a_shell if is_real else start_mxn)(words, os.environ | more, log)
    try:
        yield process
        process.terminate()
        process.wait(end_limit_s)
    finally:
        process.kill()


def _start_in_a_shell(words: list[str], env: dict[str, str], log: Path) -> Process:
    """Start a command as users do, with all that Python does before and behind `main`."""
    command = [sys.executable, "-m", "mxn.cli.main", *words]
    with log.open("w") as out:
        tuned = env | {"MXN_KERNEL_TUNING": "on"}
        return subprocess.Popen(command, stdout=out, stderr=out, env=tuned)


def _wait_until_ready(process: Process, log: Path) -> str:
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s:
        assert process.poll() is None, f"the server ended:\n{log.read_text()}"
        url = _announced(log)
        if url and _is_ready(url):
            return url
        time.sleep(0.1)
    raise AssertionError(f"the server was not ready in {START_LIMIT_S} s:\n{log.read_text()}")


def _announced(log: Path) -> str | None:
    for line in log.read_text().splitlines():
        if line.startswith("listening on "):
            return line.removeprefix("listening on ")
    return None


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write a byte-level tokenizer, whose tokens can be parts of characters, and a template."""
    import json

    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    # Fewer tokens than bytes: the model's vocabulary is small, so text is limited to these.
    vocab = {token: i for i, token in enumerate([*special, *letters][:vocab_size])}
    tokenizer = Tokenizer(BPE(vocab, [], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        ),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
