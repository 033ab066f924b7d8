"""A disk that is slow stalls no stream: files are read beside the loop, in the order asked for."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tests.engine.test_lora_engine import GREEDY, engine_of, made

from mxn.engine.protocol import (
    AdapterLoaded,
    Delta,
    Failed,
    Generate,
    LoadAdapter,
    UnloadAdapter,
)
from mxn.models import lora_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("slow"), "qwen3")


@pytest.fixture
def disk(monkeypatch) -> threading.Event:
    """Reading an adapter waits until this is set."""
    ready, real = threading.Event(), lora_files.read_adapter

    def read(path: str):
        assert threading.current_thread() is not threading.main_thread()
        assert ready.wait(10)
        return real(path)

    monkeypatch.setattr(lora_files, "read_adapter", read)
    return ready


def test_streams_go_on_while_an_adapter_is_read(folder, disk):
    core = engine_of(folder).core

    def load(name: str, of: str) -> LoadAdapter:
        return LoadAdapter(request_id=name, name=name, path=str(folder / of))

    core.handle(Generate(request_id="g", prompt_ids=[5, 6], sampling=GREEDY))
    assert core.handle(load("x", "a")) == []
    assert core.handle(load("y", "nowhere")) == []
    assert core.handle(UnloadAdapter(request_id="u", name="x")) == []
    assert core.handle(load("z", "b")) == []
    assert core.has_work
    got = [reply for _ in range(20) for reply in core.step()]
    assert isinstance(got[-1], Delta)
    assert got[-1].finish_reason, "the whole answer came while the disk was silent"
    (refused,) = core.handle(
        Generate(request_id="early", prompt_ids=[5], sampling=GREEDY, adapter="x")
    )
    assert "adapter 'x' is not loaded" in refused.message
    disk.set()
    replies = []
    while core.has_work:
        replies += core.step()
    assert [reply.request_id for reply in replies] == ["x", "y", "u", "z"]
    assert [type(reply) for reply in replies] == [
        AdapterLoaded,
        Failed,
        AdapterLoaded,
        AdapterLoaded,
    ]
    assert [reply.adapters for reply in replies[2:]] == [(), ("z",)]
    core.handle(Generate(request_id="late", prompt_ids=[5], sampling=GREEDY, adapter="z"))
    while core.has_work:
        replies += core.step()
    assert replies[-1].finish_reason == "length"
    core.validate()


def test_what_is_read_does_not_change_with_the_file(folder, tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    for source in (folder / "a").iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    files = lora_files.read_adapter(tmp_path)
    before = {name: pair.a_RD.clone() for name, pair in files.pairs.items()}
    with file.open("r+b") as opened:
        opened.seek(2048)
        opened.write(bytes(file.stat().st_size - 2048))
    assert all((files.pairs[name].a_RD == kept).all() for name, kept in before.items())
