"""What a published DeepSeek-V3 checkpoint holds beyond plain layers: FP8 blocks, MTP layers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxn.models.decoder import Decoder
from mxn.models.load import load_model
from support import tiny
from support.mtp import add_mtp_layer, edit_config
from support.paged import Session

BLOCK = (32, 20)  # ragged at the edges of every weight of the tiny model
FP8_MAX = 448.0


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (e4m3 weight, inverse scales, what they stand for), block by block."""
    rows, columns = weight.shape
    quantized = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    exact = torch.empty_like(weight)
    scales = torch.empty(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (
                slice(i * BLOCK[0], (i + 1) * BLOCK[0]),
                slice(j * BLOCK[1], (j + 1) * BLOCK[1]),
            )
            scale = weight[part].abs().max() / FP8_MAX
            quantized[part] = (weight[part] / scale).to(torch.float8_e4m3fn)
            exact[part] = quantized[part].float() * scale
            scales[i, j] = scale
    return quantized, scales, exact


@torch.inference_mode()
def test_fp8_blocks_with_ragged_edges_load_as_what_they_stand_for(tmp_path, device):
    reference = tiny.write("deepseek_v3", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    exact = {}
    for name, weight in list(stored.items()):
        if weight.dim() == 2 and "proj" in name:
            stored[name], stored[f"{name}_scale_inv"], exact[name] = quantize_blocks(weight)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    plain = tmp_path / "plain"
    reference.save_pretrained(plain)
    save_file(
        load_file(plain / "model.safetensors") | exact,
        plain / "model.safetensors",
        metadata={"format": "pt"},
    )
    edit_config(
        tmp_path,
        quantization_config={
            "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK),
            "activation_scheme": "dynamic",
        },
    )  # fmt: skip
    reference = type(reference).from_pretrained(plain).eval()

    model = load_model(tmp_path, device, "float32").model
    tokens = list(range(3, 40))
    want = reference(torch.tensor([tokens])).logits[0]
    got = Session(model).step({0: tokens})[0]
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-4


@torch.inference_mode()
def reference_prediction(directory, reference, tokens: list[int]) -> torch.Tensor:
    """The paper's equations on transformers' own layer: logits of the token after the next."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

    stored = load_file(directory / "model.safetensors")
    prefix = "model.layers.3."
    mtp = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    layer = hf.DeepseekV3DecoderLayer(reference.config, layer_idx=2).eval()
    experts = reference.config.n_routed_experts
    own = {k: v for k, v in mtp.items() if k.startswith(("self_attn", "input", "post", "mlp"))}
    stacks = {
        "mlp.experts.gate_up_proj": torch.stack([
            torch.cat([own[f"mlp.experts.{e}.{p}.weight"] for p in ("gate_proj", "up_proj")])
            for e in range(experts)
        ]),
        "mlp.experts.down_proj": torch.stack(
            [own[f"mlp.experts.{e}.down_proj.weight"] for e in range(experts)]
        ),
    }  # fmt: skip
    own = {k: v for k, v in own.items() if "experts." not in k or "shared" in k} | stacks
    layer.load_state_dict(own)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        module = hf.DeepseekV3RMSNorm(x.shape[-1], reference.config.rms_norm_eps)
        module.weight.data = mtp[name]
        return module(x)

    ids = torch.tensor([tokens])
    hidden = reference.model(ids[:, :-1]).last_hidden_state
    following = reference.model.embed_tokens(ids[:, 1:])
    merged = torch.cat((norm(following, "enorm.weight"), norm(hidden, "hnorm.weight")), -1)
    x = merged @ mtp["eh_proj.weight"].T
    count = x.shape[1]
    positions = torch.arange(count)[None]
    mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
    angles = reference.model.rotary_emb(x, positions)
    x = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=angles)
    return (norm(x, "shared_head.norm.weight") @ mtp["shared_head.head.weight"].T)[0]


@torch.inference_mode()
def test_the_prediction_layer_gives_the_logits_of_the_papers_equations(tmp_path, device):
    reference = tiny.write("deepseek_v3", tmp_path)
    add_mtp_layer(tmp_path)
    model = load_model(tmp_path, device, "float32").model
    assert isinstance(model, Decoder)
    assert len(model.mtp) == 1

    tokens = list(range(5, 31))
    session, prediction = Session(model), Session(model)
    hidden = model.hidden(session.batch({0: tokens[:-1]}), session.cache)
    logits, _ = model.predict_after_next(
        model.final_normed(hidden), prediction.batch({0: tokens[1:]}), prediction.cache[-1]
    )
    want = reference_prediction(tmp_path, reference, tokens)
    assert ((logits.cpu() - want).abs().max() / want.abs().max()).item() < 1e-4


def test_fp8_without_scales_is_refused(tmp_path, device):
    tiny.write("deepseek_v3", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    stored[name] = stored[name].to(torch.float8_e4m3fn)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"without .*scale_inv"):
        load_model(tmp_path, device, "float32")
