"""Configs and manifests that say other sizes than the tensors have: refused by name, never read."""

from __future__ import annotations

import json

import pytest

from mxn.chips import find_device
from mxn.errors import MxnError, UnsupportedError
from mxn.kernels.native import formats, missing_reason
from mxn.models.load import load_model, pack_model
from mxn.models.native.files import MANIFEST
from support import tiny

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))


def load(directory, weights=None):
    format = formats.parse(weights) if weights else None
    return load_model(directory, find_device("cpu"), "float32", format=format, num_threads=1)


@pytest.mark.parametrize(
    ("case", "key", "value", "named"),
    [
        ("llama2", "vocab_size", 100, r"head is \(131, 48\)"),
        ("llama2", "vocab_size", 655000, r"head is \(131, 48\)"),
        ("llama3", "vocab_size", 100, r"head is \(131, 48\)"),  # tied
        ("llama2", "num_key_value_heads", 2, "layer 0: qkv is"),
        ("llama2", "num_key_value_heads", 3, "divisor of 4 heads"),
        ("llama2", "num_attention_heads", 8, "layer 0: "),
        ("llama2", "intermediate_size", 64, "layer 0: up is"),
        ("llama2", "intermediate_size", 72, "layer 0: down is"),
        ("llama2", "hidden_size", 96, r"head is \(131, 48\)"),
        ("qwen3_moe", "moe_intermediate_size", 40, "expert 0: up is"),
        ("qwen3_moe", "num_experts_per_tok", 7, "top_k is 7"),
        ("deepseek_v2", "qk_rope_head_dim", 12, None),
        ("deepseek_v2", "q_lora_rank", 16, "layer 0: q_a is"),
    ],
)
def test_a_config_of_other_sizes_is_refused(case, key, value, named, tmp_path):
    tiny.write(case, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(MxnError if named is None else UnsupportedError, match=named or "."):
        load(tmp_path, "int8")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("sizes")
    tiny.write("llama2", root / "source")
    pack_model(root / "source", formats.parse("int8"), root / "packed")
    return root / "packed"


def _in_layer(manifest, part):
    return manifest["parts"]["layers"][0]["fields"]["ffn"]["fields"][part]["packed"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m["parts"]["head"]["packed"].update(in_features=48000), "head is"),
        (lambda m: _in_layer(m, "down").update(out_features=4800000), "layer 0: down is"),
        (lambda m: _in_layer(m, "down").update(scales=None), "layer 0: down: scales is None"),
        (lambda m: _in_layer(m, "down")["data"].update(shape=[16], tensor=[0, 16]), "data is"),
        (lambda m: m["spec"]["fields"].update(hidden=192), "head is"),
        (lambda m: m["spec"]["fields"].update(vocab_size=655000), "head is"),
        (lambda m: m["parts"].update(layers=m["parts"]["layers"][:2]), "layers is 2"),
        (lambda m: m["parts"].update(final_norm=None), "final norm is None"),
    ],
)
def test_a_manifest_of_other_sizes_is_refused(packed, change, named):
    path = packed / MANIFEST
    text = path.read_text()
    manifest = json.loads(text)
    change(manifest)
    path.write_text(json.dumps(manifest))
    try:
        with pytest.raises(UnsupportedError, match=named):
            load(packed)
    finally:
        path.write_text(text)
