"""What is on this machine, and how it would run."""

from __future__ import annotations

import json

from mxn.models.catalogue import find_models, shipped_models
from mxn.models.load import checkpoint_dtype


def test_the_models_of_the_clone_are_found_and_native():
    assert {"mxn-shakespeare-llama", "mxn-shakespeare-dsv3"} <= set(shipped_models())
    shipped = [entry for entry in find_models() if entry.source == "ships with mxn"]
    assert {entry.support for entry in shipped} == {"native"}
    assert all(entry.num_bytes > 0 for entry in shipped)


def test_a_directory_that_cannot_run_says_why_and_hides_no_other(tmp_path):
    configs = {
        "a-broken": "{",
        "b-gptq": {
            "architectures": ["LlamaForCausalLM"],
            "quantization_config": {"quant_method": "gptq", "bits": 2},
        },
        "c-plain": {"architectures": ["LlamaForCausalLM"]},
        "d-unknown": {"architectures": ["FalconMambaForCausalLM"]},
        "e-gptq": {
            "architectures": ["LlamaForCausalLM"],
            "quantization_config": {"quant_method": "gptq", "bits": 4},
        },
        "f-unknown-gptq": {
            "architectures": ["FalconMambaForCausalLM"],
            "quantization_config": {"quant_method": "gptq", "bits": 4},
        },
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / name / "config.json").write_text(text)
    found = [entry for entry in find_models((tmp_path,)) if entry.source == "directory"]
    support = [entry.support for entry in found]
    assert support[0].startswith("refused: config.json of")
    assert support[1].startswith("refused: the weights are quantized (gptq)")
    assert support[2:5] == ["native", "fallback", "native"]
    assert support[5] == "refused: gptq weights need a native family"


def test_the_dtype_of_a_nested_config_is_found():
    assert checkpoint_dtype({"text_config": {"torch_dtype": "bfloat16"}}) == "bfloat16"
    assert checkpoint_dtype({"torch_dtype": "torch.float16"}) == "float16"
    assert checkpoint_dtype({}) == "float32"
