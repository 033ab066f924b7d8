"""Reading weights: shards, missing and broken files, and errors that say what to do."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from mxn.errors import NotFoundError
from mxn.models.checkpoint import Checkpoint
from mxn.models.hub import resolve


def write_sharded(directory) -> None:
    save_file({"a.weight": torch.ones(2, 3)}, directory / "one.safetensors")
    save_file({"b.weight": torch.full((4,), 2.0)}, directory / "two.safetensors")
    index = {"weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text("{}")


def test_shards_are_read_by_the_index(tmp_path):
    write_sharded(tmp_path)
    seen = []
    checkpoint = Checkpoint(tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    assert checkpoint.names == ["a.weight", "b.weight"]
    assert checkpoint.read("a.weight").sum() == 6
    assert checkpoint.shape("b.weight") == (4,)
    assert checkpoint.unread == ["b.weight"]
    assert checkpoint.num_parameters == 6
    assert seen == [(24, checkpoint.num_bytes)]


def test_a_missing_shard_is_named(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"lacks 1 of 2 weight files: two\.safetensors"):
        Checkpoint(tmp_path)


def test_a_file_cut_short_is_reported_as_corrupted(tmp_path):
    save_file({"a.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-40])
    with pytest.raises(NotFoundError, match=r"model\.safetensors is not a readable"):
        Checkpoint(tmp_path)


def test_pickled_weights_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never unpickled")
    with pytest.raises(NotFoundError, match=r"pytorch_model\.bin are not loaded[\s\S]*convert"):
        Checkpoint(tmp_path)


def test_a_tensor_that_is_not_there_names_close_ones(tmp_path):
    write_sharded(tmp_path)
    with pytest.raises(
        NotFoundError, match=r"no tensor 'model\.a\.weight'; it has \['a\.weight'\]"
    ):
        Checkpoint(tmp_path).read("model.a.weight")


def test_a_broken_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(NotFoundError, match=r"config\.json of .* is broken"):
        Checkpoint(tmp_path)


def test_a_directory_without_config_is_no_model(tmp_path):
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        resolve(str(tmp_path))


def test_a_hub_id_that_is_not_cached_says_why_it_cannot_come(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotFoundError, match="HF_HUB_OFFLINE is set"):
        resolve("someone/no-such-model")


def test_one_gguf_file_of_a_hub_repository_is_asked_for_by_name(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def download(*names: str, revision: str | None) -> str:
        asked.append((*names, revision))
        return str(tmp_path / names[1])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert resolve("someone/Model-GGUF/Model-Q8_0.gguf") == tmp_path / "Model-Q8_0.gguf"
    assert asked == [("someone/Model-GGUF", "Model-Q8_0.gguf", None)]


@pytest.mark.parametrize("name", ["/no/such/dir", "model.gguf", "a b", "../up"])
def test_what_is_neither_a_directory_nor_a_hub_id_is_refused(name):
    with pytest.raises(NotFoundError, match="not a hub id"):
        resolve(name)
