"""Packed models on disk: the same logits, and a clear error for every way to break one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from mxn.chips import find_device
from mxn.engine.config import EngineConfig
from mxn.errors import ConfigError, NotFoundError, UnsupportedError
from mxn.kernels.native import formats, missing_reason
from mxn.models.load import load_model, pack_model
from mxn.models.native.files import MANIFEST, WEIGHTS
from support import tiny
from support.paged import Session

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))

PROMPT = list(range(3, 30))


def logits(model) -> torch.Tensor:
    return Session(model).step({0: PROMPT})[0]


def load(directory, weights=None):
    format = formats.parse(weights) if weights else None
    return load_model(directory, find_device("cpu"), "float32", format=format, num_threads=1)


@pytest.fixture
def packed(tmp_path):
    tiny.write("llama2", tmp_path / "source")
    pack_model(tmp_path / "source", formats.parse("int4-g32"), tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("family", ["llama2", "gemma3", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("weights", ["int8", "int4-g32", "bf16"])
def test_an_artifact_gives_the_logits_of_what_it_was_packed_from(family, weights, tmp_path):
    if family not in tiny.CASES:
        pytest.fail(f"{family} is no case of tiny: {', '.join(tiny.CASES)}")
    tiny.write(family, tmp_path / "source")
    num_bytes = pack_model(tmp_path / "source", formats.parse(weights), tmp_path / "packed")
    assert (tmp_path / "packed" / WEIGHTS).stat().st_size == num_bytes
    assert not list((tmp_path / "packed").glob("*.safetensors"))
    direct, stored = load(tmp_path / "source", weights), load(tmp_path / "packed")
    assert torch.equal(logits(direct.model), logits(stored.model))
    for name in ("family", "num_parameters", "max_context", "eos_ids", "dtype"):
        assert getattr(direct, name) == getattr(stored, name)


def test_the_cache_format_may_differ_from_what_was_packed(packed):
    format = formats.parse("int4-g32", "f32")
    model = load_model(packed, find_device("cpu"), "float32", format=format, num_threads=1).model
    assert model.format.cache == "f32"
    assert logits(model).isfinite().all()


def test_other_weights_than_the_packed_ones_are_refused(packed):
    with pytest.raises(UnsupportedError, match="packed as int4-g32, not int8"):
        load(packed, "int8")


def test_an_existing_directory_is_not_touched(packed, tmp_path):
    before = (packed / MANIFEST).read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        pack_model(tmp_path / "source", formats.parse("int8"), packed)
    assert (packed / MANIFEST).read_bytes() == before


def test_an_existing_directory_is_found_before_the_work(packed, tmp_path, monkeypatch):
    from mxn.models.native import decoder

    monkeypatch.setattr(decoder, "read_parts", lambda *_, **__: 1 / 0)
    with pytest.raises(ConfigError, match="exists"):
        pack_model(tmp_path / "source", formats.parse("int8"), packed)


def test_what_a_killed_pack_left_is_removed_and_what_runs_is_not(packed, tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                           capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    dead, alive = tmp_path / f".next.{ended}.tmp", tmp_path / f".next.{os.getppid()}.tmp"
    for path in (dead, alive):
        path.mkdir()
        (path / WEIGHTS).write_bytes(b"half")
    pack_model(tmp_path / "source", formats.parse("int8"), tmp_path / "next")
    assert (tmp_path / "next" / MANIFEST).is_file()
    assert not dead.exists()
    assert alive.exists()


def test_only_config_tokenizer_and_texts_are_copied(tmp_path):
    tiny.write("llama2", tmp_path / "source")
    wanted = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "LICENSE",
              "chat_template.jinja", "README.md")  # fmt: skip
    for name in (*wanted, "other.pth", "tf_model.h5", "flax_model.msgpack", "model.keras",
                 "model.onnx", "pytorch_model.bin.index.json"):  # fmt: skip
        (tmp_path / "source" / name).write_text("{}")
    pack_model(tmp_path / "source", formats.parse("int8"), tmp_path / "packed")
    found = {path.name for path in (tmp_path / "packed").iterdir()}
    assert found == {MANIFEST, WEIGHTS, "config.json", "generation_config.json", *wanted}


def test_weights_of_another_pack_are_refused(packed, tmp_path):
    pack_model(tmp_path / "source", formats.parse("int4-g32"), tmp_path / "again")
    (packed / WEIGHTS).write_bytes((tmp_path / "again" / WEIGHTS).read_bytes())
    with pytest.raises(UnsupportedError, match=r"has id .*says"):
        load(packed)


def test_the_spec_of_another_mxn_is_worked_out_again(packed):
    manifest = json.loads((packed / MANIFEST).read_text())
    want = logits(load(packed).model).clone()
    manifest["spec_of"] = "0.0.1 other"
    manifest["spec"]["fields"]["norm_eps"] = 5.0
    (packed / MANIFEST).write_text(json.dumps(manifest))
    assert torch.equal(logits(load(packed).model), want)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    from mxn.models.native import artifact

    tiny.write("llama2", tmp_path / "source")
    monkeypatch.setattr(artifact.shutil, "copyfile", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack_model(tmp_path / "source", formats.parse("int8"), tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_that_are_cut_short_are_named_with_both_sizes(packed):
    whole = (packed / WEIGHTS).read_bytes()
    (packed / WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(NotFoundError, match=f"{len(whole) - 100} bytes, not {len(whole)}"):
        load(packed)
    (packed / WEIGHTS).unlink()
    with pytest.raises(NotFoundError, match="is missing"):
        load(packed)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"layout": 1}', "\x00"])
def test_a_broken_manifest_is_named(packed, text):
    (packed / MANIFEST).write_text(text)
    with pytest.raises(NotFoundError, match=r"mxn-artifact\.json.*is broken"):
        load(packed)


@pytest.mark.parametrize("name", ["parts", "format", "spec", "num_parameters"])
def test_a_manifest_that_lacks_a_part_is_broken(packed, name):
    manifest = json.loads((packed / MANIFEST).read_text())
    del manifest[name]
    (packed / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(NotFoundError, match=f"is broken: KeyError.*{name}"):
        load(packed)


def test_another_layout_must_be_packed_again(packed):
    manifest = json.loads((packed / MANIFEST).read_text())
    (packed / MANIFEST).write_text(json.dumps(manifest | {"layout": 99}))
    with pytest.raises(UnsupportedError, match="layout 99"):
        load(packed)


def test_only_processors_take_packed_weights(packed, tmp_path):
    from dataclasses import replace

    device = replace(find_device("cpu"), torch_device="meta", id="other:0")
    with pytest.raises(UnsupportedError, match="runs on processors, not on other:0"):
        load_model(packed, device, "float32")
    with pytest.raises(UnsupportedError, match="weights in int8"):
        load_model(tmp_path / "source", device, "float32", format=formats.parse("int8"))


@pytest.mark.parametrize("kv", ["f32", "bf16"])
def test_the_cache_format_alone_may_be_chosen(packed, kv):
    assert EngineConfig(model=str(packed), kv=kv).kv == kv
    model = load_model(packed, find_device("cpu"), "float32", cache=kv).model
    assert model.format.cache == kv
    assert str(model.format.weights) == "int4-g32"
    assert logits(model).isfinite().all()


def test_an_unknown_cache_format_or_one_of_plain_weights_is_refused(packed, tmp_path):
    with pytest.raises(ConfigError, match="unknown cache format 'int3'"):
        EngineConfig(model=str(packed), kv="int3")
    with pytest.raises(ConfigError, match="needs weights") as raised:
        EngineConfig(model=str(tmp_path / "source"), kv="f32")
    assert "mxn pack" in str(raised.value)
