"""The suites: what each needs from the host and which command runs it. Start at `SUITES`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

Command = Callable[["Setup", "Part", str, Path], list[str]]


@dataclass(frozen=True, slots=True)
class Setup:
    """What the user gave: a Python with the suites' packages, and the checkouts."""

    python: Path
    own_python: Path  # the one mxn runs in
    checkouts: Mapping[str, Path]
    filter: str = ""
    database: str = ""
    max_examples: int = 20
    max_time_s: int = 240  # of each run of schemathesis


@dataclass(frozen=True, slots=True)
class Part:
    """One run of a suite; `server` is a `Wanted` of host.py, None: the suite asks the host."""

    name: str
    server: dict[str, Any] | None
    tests: tuple[str, ...] = ()
    needs_database: bool = False


@dataclass(frozen=True, slots=True)
class Suite:
    name: str
    title: str
    source: str
    parts: tuple[Part, ...]
    command: Command
    env: Mapping[str, str] = field(
        default_factory=dict
    )  # {url}, {checkout}, {socket}, {here}, {work}
    folder: str = "{checkout}"
    has_checkout: bool = True

    def origin(self, setup: Setup) -> str:
        """Return where the tests come from, with a version."""
        if not self.has_checkout:
            return self.source
        checkout = setup.checkouts[self.name]
        note = checkout / "VERSION"
        if note.is_file():
            return f"{self.source}, {note.read_text(encoding='utf-8').strip()}"
        commit = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
        return f"{self.source}, commit {commit.stdout.strip()}"


def _pytest(setup: Setup, part: Part, url: str, junit: Path) -> list[str]:
    command = [str(setup.python), "-m", "pytest", *part.tests, "-q", "-p", "no:cacheprovider"]
    command += ["--tb=short", "--timeout=60", f"--junitxml={junit}", "-m", "not slow"]
    return [*command, "-k", setup.filter] if setup.filter else command


def _langchain(setup: Setup, part: Part, url: str, junit: Path) -> list[str]:
    # Not this repository's pytest settings: the suite runs in a Python of its own.
    own = ["-c", "/dev/null", "--rootdir", str(HERE), "-o", "asyncio_mode=auto"]
    # One loop for all tests: the client keeps its connections.
    own += [f"-oasyncio_default_{what}_loop_scope=session" for what in ("test", "fixture")]
    return [*_pytest(setup, part, url, junit), *own]


def _stainless(setup: Setup, part: Part, url: str, junit: Path) -> list[str]:
    return [*_pytest(setup, part, url, junit), "-n", "0", "-W", "default"]


def _schemathesis(setup: Setup, part: Part, url: str, junit: Path) -> list[str]:
    return [
        str(setup.own_python.with_name("schemathesis")), "run", f"{url}/openapi.json",
        "--workers", "1", "--max-examples", str(setup.max_examples), "--seed", "1",
        "--max-time", str(setup.max_time_s),
        "--phases", "examples,coverage,fuzzing", "--continue-on-failure",
        "--checks", "not_a_server_error,response_schema_conformance,content_type_conformance",
        "--suppress-health-check", "all", "--request-timeout", "30",
        "--generation-database", "none",
        "--report", "junit", "--report-junit-path", str(junit), "--no-color", "--warnings", "off",
    ]  # fmt: skip


_API = "tests/api_resources"

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="openai",
            title="openai-python's own tests",
            source="github.com/openai/openai-python",
            command=_stainless,
            env={"TEST_API_BASE_URL": "{url}/v1", "PYTHONPATH": "{checkout}/src:{checkout}"},
            parts=(
                Part(
                    "chat",
                    {"models": ["decoder"]},
                    (
                        f"{_API}/test_models.py",
                        f"{_API}/test_completions.py",
                        f"{_API}/chat",
                        f"{_API}/test_responses.py",
                        f"{_API}/responses",
                    ),
                ),
                Part("embeddings", {"models": ["embedder"]}, (f"{_API}/test_embeddings.py",)),
                Part(
                    "files",
                    {"models": ["decoder"], "api_keys": ["My API Key"]},  # the suite's own
                    (f"{_API}/test_files.py", f"{_API}/test_batches.py"),
                    needs_database=True,
                ),
            ),
        ),
        Suite(
            name="anthropic",
            title="anthropic-sdk-python's own tests",
            source="github.com/anthropics/anthropic-sdk-python",
            command=_stainless,
            env={"TEST_API_BASE_URL": "{url}", "PYTHONPATH": "{checkout}/src:{checkout}"},
            parts=(Part("messages", {"models": ["decoder"]}, (f"{_API}/test_messages.py",)),),
        ),
        Suite(
            name="llamacpp",
            title="llama.cpp's server tests",
            source="github.com/ggml-org/llama.cpp, tools/server/tests",
            command=_pytest,
            env={
                "LLAMA_SERVER_BIN_PATH": "{here}/llama_server.py",
                "MXN_JUDGES_SOCKET": "{socket}",
                "PORT": "18090",
                "PYTHONPATH": ".",
            },
            folder="{checkout}/tools/server/tests",
            parts=(
                Part(
                    "fast",
                    None,
                    tuple(
                        f"unit/test_{name}.py"
                        for name in (
                            "basic", "chat_completion", "completion", "compat_anthropic",
                            "compat_oai_responses", "embedding", "rerank", "security",
                            "tokenize", "template", "tool_call",
                        )
                    ),
                ),
            ),
        ),
        Suite(
            name="langchain",
            title="langchain's standard tests",
            source="PyPI langchain-tests with langchain-openai",
            command=_langchain,
            env={"MXN_JUDGES_URL": "{url}"},
            folder="{here}",
            has_checkout=False,
            parts=(Part("chat", {"models": ["decoder"]}, ("test_langchain.py",)),),
        ),
        Suite(
            name="schemathesis",
            title="schemathesis on our own OpenAPI document",
            source=f"PyPI schemathesis {version('schemathesis')}, bounded examples",
            command=_schemathesis,
            folder="{work}",
            has_checkout=False,
            parts=(
                Part("echo", {"models": ["echo", "echo-embedder", "echo-reranker"],
                              "is_lenient": False}),
                Part("real", {"models": ["decoder", "embedder"], "is_lenient": False}),
            ),
        ),
    )
}  # fmt: skip
