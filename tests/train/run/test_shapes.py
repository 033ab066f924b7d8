"""The planner's view of a model against transformers' own count, and against hand-made sums."""

from __future__ import annotations

import json

import pytest

from mxn.errors import UnsupportedError, UserError
from mxn.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec
from mxn.train.shapes import layer_kinds, mean_context, model_shape, read_shape
from support import tiny


@pytest.mark.parametrize("case", tiny.CASES)
def test_parameters_are_those_transformers_counts(case, tmp_path):
    model = tiny.write(case, tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()  # config.json alone must be enough
    assert read_shape(tmp_path, seq_tokens=32).params == model.num_parameters()


@pytest.mark.parametrize("case", ["llama3", "qwen2_moe", "mixtral", "deepseek_v3", "gemma2"])
def test_work_is_what_torch_counts_in_the_reference(case, tmp_path):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny.write(case, tmp_path)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # the counter does not know grouped products
    tokens = 24
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(tokens)[None] % tiny.VOCAB, use_cache=False)
    shape = read_shape(tmp_path, seq_tokens=tokens)
    # The reference computes scores of the whole square and masks them afterwards.
    masked = sum(
        2.0 * a.num_heads * (a.head_dim + (a.mla.v_dim if a.mla else a.head_dim))
        * (tokens - mean_context(tokens, a.window))
        for a in (layer.attention for layer in _spec(tmp_path).layers)
    )  # fmt: skip
    ours = sum(layer.forward_flop for layer in shape.layers) + masked
    assert ours * tokens == pytest.approx(counter.get_total_flops(), rel=0.01)  # it counts angles


def test_experts_count_whole_in_params_and_chosen_in_active_params(tmp_path):
    tiny.write("mixtral", tmp_path)  # 5 experts of 3 x 48 x 80, two chosen
    block = read_shape(tmp_path, seq_tokens=8).layers[1]
    assert block.kind == "block.moe"
    assert block.active_params is not None
    assert block.params - block.active_params == 3 * 3 * 48 * 80
    assert block.routed_to == 2


def test_kinds_name_what_costs_differently(tmp_path):
    tiny.write("gemma3", tmp_path)
    windowed, full = "block.window", "block"
    assert layer_kinds(_spec(tmp_path)) == (
        "embedding", *[windowed] * 5, full, windowed, "head",
    )  # fmt: skip
    (tmp_path / "config.json").unlink()
    tiny.write("deepseek_v3", tmp_path)
    assert layer_kinds(_spec(tmp_path)) == ("embedding", "block", *["block.moe"] * 2, "head")


def test_blocks_of_two_widths_are_two_kinds():
    def layer(width: int) -> LayerSpec:
        attention = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4, scale=1.0, rope=None)
        return LayerSpec(attention=attention, ffn=MlpSpec(intermediate=width, activation="silu"))

    spec = DecoderSpec(
        family="llama", vocab_size=10, hidden=8, norm_eps=1e-6, max_positions=16,
        layers=(layer(16), layer(32), layer(16)),
    )  # fmt: skip
    assert layer_kinds(spec) == ("embedding", "block", "block.2", "block", "head")
    shape = model_shape(spec, name="two", seq_tokens=4)
    block = 8 * (8 + 4 + 4 + 8)  # q, k, v, o
    assert shape.layers[1].params == block + 3 * 8 * 16 + 16
    # 2 flop a weight, and scores and mixing over 2.5 tokens on average.
    assert shape.layers[1].forward_flop == 2 * (block + 3 * 8 * 16) + 2 * 2 * (4 + 4) * 2.5
    assert shape.layers[2].params - shape.layers[1].params == 3 * 8 * 16
    assert shape.layers[0].output_bytes == 32
    assert shape.layers[-1].forward_flop == 160


@pytest.mark.parametrize(("seq_tokens", "window", "mean"), [(1, None, 1), (5, 1, 1), (6, 9, 3.5)])
def test_mean_context(seq_tokens, window, mean):
    assert mean_context(seq_tokens, window) == mean


def test_a_bad_row_length_or_family_is_refused(tmp_path):
    tiny.write("llama2", tmp_path)
    with pytest.raises(UserError, match="513 tokens in a row"):
        read_shape(tmp_path, seq_tokens=513)
    with pytest.raises(UserError, match="dtype 'fp8'"):
        read_shape(tmp_path, seq_tokens=8, dtype="fp8")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["FooForBar"]}))
    with pytest.raises(UnsupportedError, match="no native spec"):
        read_shape(tmp_path, seq_tokens=8)


def _spec(directory) -> DecoderSpec:
    from mxn.models.families import find_decoder
    from mxn.models.families.config import load_config

    config_json = json.loads((directory / "config.json").read_text())
    family = find_decoder(config_json)
    assert family is not None
    return family.spec(load_config(directory, config_json))
