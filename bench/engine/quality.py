"""What each format costs in quality: perplexity and logit error of the shipped model.

    python bench/engine/quality.py --peers FOLDER --contenders mxn:int4-g64,llama.cpp:q4_0

The text is the held-out tenth of recipes/data (public domain), which the model was not trained on.
Every engine gets the same token ids, in windows that start without context; the first half of a
window is context only. The truth is transformers in float32. Knows no speed. Start at `measure`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import contenders
import numpy
from protocol import Failed, Load, Peer, Refused, end_on_signal
from setup_peers import default_folder

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "llama": ROOT / "src/mxn/shipped/mxn-shakespeare-llama",
    "dsv3": ROOT / "src/mxn/shipped/mxn-shakespeare-dsv3",
}
TRUTH = "transformers:f32"
DEFAULT = (
    "mxn:bf16", "mxn:int8", "mxn:int4-g64", "openvino:int8", "openvino:int4", "llama.cpp:q8_0",
    "llama.cpp:q4_0", "transformers:bf16",
)  # fmt: skip


def windows(model: Path, count: int, length: int) -> list[list[int]]:
    """Return windows of held-out text as token ids, evenly spread over it."""
    from tokenizers import Tokenizer

    sys.path.insert(0, str(ROOT / "recipes"))
    from shakespeare.corpus import load_split

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(load_split().heldout, add_special_tokens=False).ids
    stride = (len(ids) - length) // max(1, count - 1)
    return [ids[i * stride : i * stride + length] for i in range(count)]


def logits(peer: Peer, texts: list[list[int]]) -> list[Any]:
    """Return float32 [T, V] for each window. Raises: Failed, Refused."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits.npy"
        for ids in texts:
            peer.ask("logits", prompt=ids, is_last_only=False, path=str(path))
            found.append(numpy.load(path))
    return found


def perplexity(texts: list[list[int]], found: list[Any]) -> float:
    """Return the perplexity of the second half of each window."""
    total = count = 0.0
    for ids, logits_TV in zip(texts, found, strict=True):
        half = len(ids) // 2
        rows = logits_TV[half - 1 : -1].astype(numpy.float64)
        rows -= rows.max(-1, keepdims=True)
        chosen = rows[numpy.arange(len(rows)), ids[half:]]
        total += float((numpy.log(numpy.exp(rows).sum(-1)) - chosen).sum())
        count += len(rows)
    return math.exp(total / count)


def divergence(true: list[Any], found: list[Any]) -> dict[str, float]:
    """Return error of the logits, mean KL divergence, and how often the best token agrees."""
    a, b = numpy.concatenate(true).astype("f8"), numpy.concatenate(found).astype("f8")
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    log_a = a - numpy.log(numpy.exp(a).sum(-1, keepdims=True))
    log_b = b - numpy.log(numpy.exp(b).sum(-1, keepdims=True))
    return {
        "rms_error": float(((a - b) ** 2).mean() ** 0.5 / (a**2).mean() ** 0.5),
        "mean_kl": float((numpy.exp(log_a) * (log_a - log_b)).sum(-1).mean()),
        "same_top1": float((a.argmax(-1) == b.argmax(-1)).mean()),
    }


def run(name: str, model: Path, peers: Path, texts: list[list[int]], threads: int) -> list[Any]:
    """Load one contender, return its logits, end it. Raises: Failed, Refused."""
    contender = contenders.find(name)
    built = contenders.built(contender, model, peers)
    peer = contenders.peer(contender, peers, threads, None)
    load = Load(
        model=str(model), built=str(built), weights=contender.weights, threads=threads,
        max_context=1024, max_sequences=1, kv_tokens=2048,
    )  # fmt: skip
    try:
        peer.load(load)
        return logits(peer, texts)
    finally:
        peer.stop()


def measure(
    names: list[str], model: Path, peers: Path, texts: list[list[int]], threads: int, until_s: float
) -> list[dict[str, Any]]:
    """Return one row for each contender; the one that cannot says why.

    Raises: Failed when there is no truth to compare with.
    """
    true = run(TRUTH, model, peers, texts, threads)
    rows: list[dict[str, Any]] = [{"contender": TRUTH, "perplexity": perplexity(texts, true)}]
    for name in names:
        if time.monotonic() > until_s:
            rows.append({"contender": name, "error": "the minutes were over"})
            continue
        try:
            found = run(name, model, peers, texts, threads)
        except (Failed, Refused) as error:
            rows.append({"contender": name, "error": str(error)})
            continue
        row = {"contender": name, "perplexity": perplexity(texts, found)}
        rows.append(row | divergence(true, found))
    return rows


def main() -> None:
    end_on_signal()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama", choices=MODELS)
    parser.add_argument("--contenders", default=",".join(DEFAULT))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=5, help="no new contender after")
    parser.add_argument("--peers", type=Path, help="folder of setup_peers.py; MXN_HOME/peers")
    parser.add_argument("--out", type=Path, help="also store the JSON in this file")
    arguments = parser.parse_args()
    until_s = time.monotonic() + 60 * arguments.minutes
    peers = (arguments.peers or default_folder()).resolve()
    model = MODELS[arguments.model]
    texts = windows(model, arguments.windows, arguments.length)
    names = arguments.contenders.split(",")
    rows = measure(names, model, peers, texts, arguments.threads, until_s)
    for row in rows:
        values = (f"{key} {value:.5g}" for key, value in row.items() if isinstance(value, float))
        print(f"{row['contender']:18} {', '.join(values) or row.get('error')}")
    document = json.dumps({
        "schema": 1, "case": "engine_quality", "basis": "measured", "model": model.name,
        "params": {"windows": arguments.windows, "length": arguments.length}, "rows": rows,
    })  # fmt: skip
    if arguments.out:
        arguments.out.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
