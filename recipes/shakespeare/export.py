"""From a trained network to a Hugging Face folder, checked against `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from shakespeare.bpe import write_tokenizer
from shakespeare.nets import Network
from shakespeare.shapes import CONTEXT_TOKENS

# Two implementations of the same float32 network; larger means that they are not the same.
EXPORT_MAX_RELATIVE_ERROR = 1e-4
_GENERATION = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "do_sample": True,
    "temperature": 0.8,
    "top_p": 0.95,
}


def weights_for_file(network: Network) -> dict[str, Tensor]:
    """Return bfloat16 weights under Hugging Face names; the balance bias stays in float32."""
    weights = {
        name: tensor.detach().float().clone()
        if name.endswith("e_score_correction_bias")
        else tensor.detach().to(torch.bfloat16).clone()
        for name, tensor in network.state_dict().items()
    }
    if network.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def write_checkpoint(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights, configuration, generation defaults and tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights_for_file(network)
    part = folder / "model.safetensors.part"
    save_file(weights, part, metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(folder / "model.safetensors")  # a server that maps the older file keeps it
    config = network.config
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    _write_json(folder / "generation_config.json", _GENERATION)
    write_tokenizer(tokenizer, folder, CONTEXT_TOKENS)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def check_against_transformers(network: Network, folder: Path, ids: Tensor) -> float:
    """Return the largest relative error of float32 logits for `ids` [tokens], both with the file's
    weights. Raises: ValueError above EXPORT_MAX_RELATIVE_ERROR.
    """
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    network.eval()
    for parameter in network.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    want, got = loaded(ids[None]).logits, network(ids[None])
    error = float((want - got).abs().max() / want.abs().max())
    if not error <= EXPORT_MAX_RELATIVE_ERROR:
        raise ValueError(
            f"{folder}: transformers gives other logits than the trained network, relative error "
            f"{error:.2e}, limit {EXPORT_MAX_RELATIVE_ERROR}"
        )
    return error
