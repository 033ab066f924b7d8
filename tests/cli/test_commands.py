"""`mxn serve`, `ps`, `chat`, `run`: mistakes are one line, and what they start ends with them."""

from __future__ import annotations

import http.server
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mxn.cli.local_key import ensure_local_key
from mxn.engine.config import EngineConfig
from mxn.errors import ConfigError
from mxn.serve.launch import ModelRequest, load_models
from mxn.serve.running import announce, list_servers
from mxn.serve.served import ServedModels
from support.forked_commands import start_mxn
from support.server import serving


@pytest.mark.parametrize("port", [99999, -1])
def test_a_port_that_does_not_exist_is_one_line(mxn, model, port):
    done = mxn("serve", model, "--port", port)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: cannot listen on 127.0.0.1")


def test_two_models_of_one_name_are_refused_before_loading(mxn, model):
    done = mxn("serve", model, model, "--port", 0)
    assert done.returncode == 2
    assert "two models are named" in done.stderr


def test_an_empty_key_is_refused(mxn, model):
    done = mxn("serve", model, "--port", 0, "--api-key", "")
    assert done.returncode == 2
    assert "API key is empty" in done.stderr


def test_an_address_without_a_server_is_one_line(mxn):
    done = mxn("chat", "--url", "http://127.0.0.1:1", input="hi\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no answer from http://127.0.0.1:1")


@pytest.fixture
def locked(model, home, monkeypatch):
    """A server that asks for the key of this machine."""
    monkeypatch.setenv("MXN_HOME", str(home))
    key = ensure_local_key()
    with serving(model, home, "--api-key", key) as url:
        yield url


def test_ps_and_chat_know_the_key_of_this_machine(mxn, locked):
    row = json.loads(mxn("ps", "--json").stdout)[0]
    assert (row["url"], row["model"], row["state"]) == (locked, "tiny", "ready")
    assert row["kv_pages_total"] > 0
    assert locked in mxn("ps").stdout  # a pipe does not cut the names
    environment = os.environ | {"OPENAI_API_KEY": "sk-of-somebody-else"}
    with_key = environment | {"http_proxy": "http://127.0.0.1:1"}
    command = [sys.executable, "-m", "mxn.cli.main", "chat", "--max-tokens", "3"]
    done = subprocess.run(
        command, env=with_key, input="hi\n", capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def without_the_end_of_the_weights(model: Path, folder: Path) -> Path:
    """Return a copy of a model whose download broke off."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def test_ps_says_that_a_model_failed_and_not_that_it_loads(mxn, model, home, tmp_path):
    broken = without_the_end_of_the_weights(model, tmp_path / "broken")
    server = start_mxn(
        ["serve", str(model), str(broken), "--port", "0"],
        os.environ | {"MXN_HOME": str(home)}, home / "log",
    )  # fmt: skip
    try:
        deadline_s = time.monotonic() + 60
        while "cannot be served" not in (home / "log").read_text():
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        rows = {row["model"]: row["state"] for row in json.loads(mxn("ps", "--json").stdout)}
        assert rows[broken.name] == "failed"
        assert rows.get(model.name) in ("ready", "loading")
    finally:
        server.terminate()
        server.wait(30)


def test_sigterm_removes_the_note_of_the_server(model, home):
    with serving(model, home, is_real=True):
        assert len(list((home / "servers").iterdir())) == 1
    assert list((home / "servers").iterdir()) == []


def test_the_key_of_this_machine_stays_on_it(home, monkeypatch):
    from mxn.cli.chat import _Remote

    monkeypatch.setenv("MXN_HOME", str(home))
    key = ensure_local_key()
    here, there = (_Remote(url, None, None, {}) for url in ("http://localhost:1", "http://a.test"))
    assert here._http.headers["authorization"] == f"Bearer {key}"
    assert "authorization" not in there._http.headers


def test_ctrl_c_at_the_prompt_ends_the_chat(home):
    class Models(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"data": [{"id": "m"}]}'
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Models)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mxn.cli.main", "chat", "--url"]
    chat = subprocess.Popen(
        [*command, f"http://127.0.0.1:{server.server_port}"], stdin=theirs, stdout=theirs,
        stderr=theirs, env=os.environ | {"MXN_HOME": str(home)},
    )  # fmt: skip
    try:
        shown = b""
        while b"> " not in shown:
            shown += os.read(ours, 1000)
        time.sleep(0.2)
        chat.send_signal(signal.SIGINT)
        assert chat.wait(10) == 130
    finally:
        chat.kill()
        server.shutdown()


def test_names_are_checked_and_a_failed_load_leaves_no_engine(model, monkeypatch):
    import asyncio

    def config(path: Path) -> EngineConfig:
        return EngineConfig(model=str(path), threads=1)

    same = [
        ModelRequest(name="a", config=config(model)),
        ModelRequest(name="a", config=config(model)),
    ]
    with pytest.raises(ConfigError, match="two models are named 'a'"):
        asyncio.run(load_models(ServedModels(), same))

    import psutil

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug in reading the tokenizer")

    monkeypatch.setattr("mxn.serve.served.ServedModel.load", broken)

    async def load() -> list[psutil.Process]:
        with pytest.raises(RuntimeError):
            await load_models(ServedModels(), same[:1])
        return psutil.Process().children()

    before = set(psutil.Process().children())
    assert set(asyncio.run(load())) <= before


def test_a_note_of_a_reused_process_number_is_not_a_server(home, monkeypatch):
    monkeypatch.setenv("MXN_HOME", str(home))
    path = announce("http://127.0.0.1:1", ["m"], needs_key=False)
    assert [server.url for server in list_servers()] == ["http://127.0.0.1:1"]
    old = json.loads(path.read_bytes()) | {"started_s": 1.0}  # this process is younger than that
    path.write_text(json.dumps(old))
    assert list_servers() == []
    assert not path.exists()


def test_a_server_whose_only_model_cannot_be_loaded_ends_with_the_reason(mxn, model, tmp_path):
    done = mxn("serve", without_the_end_of_the_weights(model, tmp_path / "broken"), "--port", 0)
    assert done.returncode == 2
    assert "model.safetensors is not a readable safetensors file" in done.stderr
    assert "Traceback" not in done.stderr
