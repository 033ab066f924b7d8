"""GGUF files that are cut short, damaged, foreign or split: clear errors, never a crash."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mxn.errors import MxnError, NotFoundError, UnsupportedError
from mxn.models.catalogue import find_models
from mxn.models.checkpoint import Checkpoint
from mxn.models.hub import resolve
from mxn.models.quantized.gguf_export import write_files
from mxn.models.quantized.gguf_storage import GgufStorage
from mxn.models.storage import read_config
from mxn.models.tokenizer import Tokenizer
from support import gguf_writer as gguf

TOKENS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"],
          "tokenizer.ggml.token_type": [1, 1, 1], "tokenizer.ggml.merges": ["a b"]}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A file of few tensors, and its bytes."""
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    tensors = {
        "token_embd.weight": gguf.Stored.plain(torch.randn(5, 8)),
        "blk.0.attn_norm.weight": gguf.Stored.plain(torch.ones(8)),
    }
    metadata = gguf.llama(**TOKENS, **{"tokenizer.ggml.pre": "gpt-2", "general.name": "good"})
    return path, gguf.write(path, metadata, tensors)


def test_what_is_written_is_read(good):
    storage = GgufStorage(good[0])
    assert storage.names == ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
    assert storage.shape("model.embed_tokens.weight") == (5, 8)
    assert torch.equal(storage.read("model.layers.0.input_layernorm.weight"), torch.ones(8))
    assert storage.metadata["tokenizer.ggml.tokens"] == ["a", "b", "ab"]
    assert storage.config_json["vocab_size"] == 5
    assert storage.config_json["dtype"] == "float32"


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_file_cut_anywhere_says_so_and_names_the_file(good, tmp_path, data):
    cut = data.draw(st.integers(0, len(good[1]) - 1))
    path = tmp_path / "cut.gguf"
    path.write_bytes(good[1][:cut])
    with pytest.raises(MxnError, match=r"cut\.gguf"):
        GgufStorage(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_header_is_read_or_refused_but_never_crashes(good, tmp_path, data):
    raw = bytearray(good[1])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 200))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw)
    said = str(path)
    try:
        GgufStorage(path)
        Tokenizer.load(path).encode("abba")
    except MxnError as error:
        said = str(error)
    assert "damaged.gguf" in said


def test_a_tensor_beyond_the_end_is_named(good, tmp_path):
    path = tmp_path / "short.gguf"
    path.write_bytes(good[1][:-8])
    with pytest.raises(NotFoundError, match=r"short\.gguf[\s\S]*blk\.0\.attn_norm\.weight"):
        GgufStorage(path)


EMBEDDING = gguf.Stored.plain(torch.ones(4, 256))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"magic": b"GGML"}, r"starts with b'GGML'"),
        ({"version": 1}, "GGUF version 1"),
        ({"version": 3 << 24}, "big-endian"),
    ],
)
def test_other_files_are_told_apart(tmp_path, options, said):
    path = tmp_path / "other.gguf"
    gguf.write(path, gguf.llama(), {"token_embd.weight": EMBEDDING}, **options)
    with pytest.raises(UnsupportedError, match=said):
        GgufStorage(path)


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (gguf.Stored((4, 256), 16, bytes(66 * 4)), r"token_embd\.weight is of type IQ2_XXS \(16\)"),
        (gguf.Stored((4, 256), 99, bytes(4)), r"token_embd\.weight is of type unknown \(99\)"),
        (gguf.Stored((4, 100), gguf.Q4_K, bytes(144)), r"token_embd\.weight has 100 columns"),
        (gguf.Stored((), gguf.F32, bytes(4)), r"token_embd\.weight has 0 dimensions"),
        (gguf.Stored((0, 4), gguf.F32, b""), r"token_embd\.weight has no elements"),
    ],
)
def test_a_tensor_that_cannot_be_read_is_named(tmp_path, stored, said):
    path = tmp_path / "x.gguf"
    gguf.write(path, gguf.llama(), {"token_embd.weight": stored})
    with pytest.raises(MxnError, match=rf"x\.gguf[\s\S]*{said}"):
        GgufStorage(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba'"),
        ({"llama.embedding_length": None}, "no metadata 'llama.embedding_length'"),
        ({"llama.attention.head_count": 0}, "head_count is 0, not a positive"),
        ({"llama.block_count": "two"}, "block_count is 'two', not a positive"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"differs among layers: \[2, 1\]"),
        ({"llama.expert_count": 8}, "llama with experts"),
        ({"llama.rope.dimension_count": 32}, "rotates 32 of 64 dims"),
        ({"llama.rope.scaling.type": "su"}, "rope scaling 'su'"),
        ({"general.alignment": "x"}, "alignment is 'x'"),
    ],
)
def test_metadata_that_is_not_understood_is_named(tmp_path, changes, said):
    path = tmp_path / "x.gguf"
    gguf.write(path, gguf.llama(**changes), {"token_embd.weight": EMBEDDING})
    with pytest.raises(MxnError, match=rf"x\.gguf[\s\S]*{said}"):
        GgufStorage(path)


def test_a_file_without_an_embedding_is_no_model(tmp_path):
    gguf.write(tmp_path / "x.gguf", gguf.llama(), {"other.weight": EMBEDDING})
    with pytest.raises(UnsupportedError, match=r"no tensor 'token_embd\.weight'"):
        GgufStorage(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.original_context_length": 64,
            },
            {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ],
)  # fmt: skip
def test_rope_scaling_becomes_rope_parameters(tmp_path, changes, want):
    gguf.write(tmp_path / "x.gguf", gguf.llama(**changes), {"token_embd.weight": EMBEDDING})
    assert read_config(tmp_path / "x.gguf")["rope_parameters"] == want


def test_any_alignment_is_followed(tmp_path):
    tensors = {"token_embd.weight": EMBEDDING, "a.weight": gguf.Stored.plain(torch.arange(3.0))}
    metadata = gguf.llama(**{"general.alignment": 1, "pad": "x"})
    gguf.write(tmp_path / "x.gguf", metadata, tensors, alignment=1)
    assert GgufStorage(tmp_path / "x.gguf").read("a.weight").tolist() == [0.0, 1.0, 2.0]


def test_the_numbered_files_of_a_model_are_read_as_one(tmp_path):
    first, second = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    gguf.write(first, gguf.llama(), {"token_embd.weight": EMBEDDING})
    with pytest.raises(NotFoundError, match=r"lacks 1 of 2 parts: m-00002-of-00002\.gguf"):
        GgufStorage(first)
    gguf.write(second, {}, {"output_norm.weight": gguf.Stored.plain(torch.ones(256))})
    assert resolve(str(tmp_path)) == first
    assert GgufStorage(first).names == ["model.embed_tokens.weight", "model.norm.weight"]


def test_rotary_divisors_are_found_in_any_of_the_numbered_files(tmp_path):
    factors = gguf.Stored.plain(torch.linspace(1, 8, 32))
    parts = [{"token_embd.weight": EMBEDDING}, {"rope_freqs.weight": factors}]
    for order in (parts, parts[::-1]):
        for i, tensors in enumerate(order, 1):
            gguf.write(tmp_path / f"m-0000{i}-of-00002.gguf", gguf.llama(), tensors)
        storage = GgufStorage(tmp_path / "m-00001-of-00002.gguf")
        rope = storage.config_json["rope_parameters"]
        assert rope["rope_type"] == "longrope"
        assert rope["long_factor"] == torch.linspace(1, 8, 32).tolist()
        assert storage.names == ["model.embed_tokens.weight"]


def test_a_directory_means_its_one_gguf_file(tmp_path):
    with pytest.raises(NotFoundError, match=r"no config\.json and no GGUF file"):
        resolve(str(tmp_path))
    gguf.write(tmp_path / "a.gguf", gguf.llama(), {"token_embd.weight": EMBEDDING})
    (tmp_path / "mmproj-a.gguf").write_bytes(b"of a vision model")
    assert resolve(str(tmp_path)) == tmp_path / "a.gguf"
    assert resolve(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    gguf.write(tmp_path / "b.gguf", gguf.llama(), {"token_embd.weight": EMBEDDING})
    with pytest.raises(NotFoundError, match=r"2 GGUF models: a\.gguf, b\.gguf"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve(str(tmp_path)) == tmp_path


def test_gguf_files_are_listed_with_what_they_hold(tmp_path):
    gguf.write(tmp_path / "a.gguf", gguf.llama(), {"token_embd.weight": EMBEDDING})
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    entries = [entry for entry in find_models((tmp_path,)) if entry.source == "directory"]
    assert [entry.architecture for entry in entries] == ["LlamaForCausalLM", "unknown"]
    assert entries[0].support == "native"
    assert entries[0].num_bytes == (tmp_path / "a.gguf").stat().st_size
    assert entries[1].support.startswith("refused: ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer.ggml.pre": "of-2031"}, "rule 'of-2031'"),
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert'"),
        ({"tokenizer.ggml.token_type": [1]}, "3 tokens, 1 types"),
        ({"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["ab"]}, "'ab' is no merge"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_asks_for_its_files(tmp_path, changes, said):
    gguf.write(tmp_path / "x.gguf", gguf.llama(**(TOKENS | changes)), {})
    with pytest.raises(UnsupportedError, match=rf"{said}[\s\S]*tokenizer\.json"):
        Tokenizer.load(tmp_path / "x.gguf")


def test_a_tokenizer_beside_the_file_takes_the_place_of_one_that_is_not_known(tmp_path):
    from mxn.models.catalogue import shipped_models

    shipped = shipped_models()["mxn-shakespeare-llama"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((shipped / name).read_bytes())
    gguf.write(tmp_path / "x.gguf", gguf.llama(**TOKENS, **{"tokenizer.ggml.pre": "new"}), {})
    want, got = Tokenizer.load(shipped), Tokenizer.load(tmp_path / "x.gguf")
    assert got.encode("Romeo, Romeo") == want.encode("Romeo, Romeo")
    assert got.has_chat_template


def test_what_the_file_says_beside_weights_can_be_written_as_a_directory(tmp_path):
    tensors = {"token_embd.weight": gguf.Stored.plain(torch.ones(3, 256))}
    fields = TOKENS | {
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_eos_token": True,
    }  # fmt: skip
    gguf.write(tmp_path / "x.gguf", gguf.llama(**fields), tensors)
    out = tmp_path / "out"
    out.mkdir()
    write_files(tmp_path / "x.gguf", out)
    want, got = Tokenizer.load(tmp_path / "x.gguf"), Tokenizer.load(out)
    assert got.encode("abba") == want.encode("abba")
    assert got.encode("ab")[-1] == 2
    assert got.special_tokens == want.special_tokens
    assert got.has_chat_template
    config = read_config(tmp_path / "x.gguf")
    del config["quantization_config"]
    assert read_config(out) == config


def test_llama_3_takes_a_whole_word_that_is_a_token_and_begins_with_bos(tmp_path):
    vocabulary = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": ["a", "b", "c", "ab", "abc", "<s>", "</s>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 3, 3], "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.eos_token_id": 6,
        "tokenizer.ggml.eot_token_id": 3,
    }  # fmt: skip
    vocabulary["tokenizer.ggml.tokens"].append("<|endoftext|>")
    vocabulary["tokenizer.ggml.token_type"].append(3)
    tensors = {"token_embd.weight": gguf.Stored.plain(torch.ones(8, 256))}
    gguf.write(tmp_path / "x.gguf", gguf.llama(**vocabulary), tensors)
    tokenizer = Tokenizer.load(tmp_path / "x.gguf")
    assert tokenizer.encode("abc") == [5, 4]
    assert tokenizer.encode("abc</s>", add_special_tokens=False) == [4, 6]
    config = Checkpoint(tmp_path / "x.gguf").config_json
    assert config["eos_token_id"] == [6, 3, 7]
    assert json.loads(json.dumps(config)) == config
