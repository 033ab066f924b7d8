"""Is an engine right: its logits against float32 transformers on the same checkpoint.

Where an engine gives no logits, its greedy tokens are looked up in the true logits instead. Knows
no speed. Start at `Truth.make` and `Truth.check`.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contenders
from models import SHAPES
from protocol import Load, Peer, Refused, prompt

TOKENS = 48  # of the prompt whose every position is compared
# RMS of the error over RMS of the true logits (their mean taken off). Random weights have no
# outliers and no slack: four bits cost more here than in a trained model.
ALLOWED = {"f32": 1e-3, "bf16": 0.05, "plain": 0.05, "int8": 0.10, "q8_0": 0.10}
ALLOWED_4_BIT = 0.50


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """`rms_error` is None where there are no logits: then `gap` says how far its tokens are from
    the best ones, as a part of the spread of the true logits."""

    rms_error: float | None = None
    max_error: float | None = None
    same_top1: float | None = None
    gap: float | None = None
    is_right: bool


@dataclass(frozen=True, slots=True)
class Truth:
    prompt: list[int]
    logits_TV: Any

    @classmethod
    def make(cls, model: Path, peers: Path, threads: int, shape: str) -> Truth:
        """Run float32 transformers once, in a process that ends before anything is measured."""
        tokens = prompt(77, TOKENS, SHAPES[shape]["vocab_size"])
        contender = contenders.find("transformers:f32")
        peer = contenders.peer(contender, peers, threads, None)
        load = Load(
            model=str(model), built=str(model), weights="f32", threads=threads, max_context=1024,
            max_sequences=1, kv_tokens=1024,
        )  # fmt: skip
        try:
            peer.load(load)
            return cls(tokens, _logits(peer, tokens))
        finally:
            peer.stop()

    def check(self, peer: Peer, weights: str) -> Accuracy:
        """Compare a loaded engine. Raises: Failed when it breaks."""
        allowed = ALLOWED.get(weights.partition("/")[0], ALLOWED_4_BIT)
        try:
            found = _logits(peer, self.prompt)
        except Refused:
            return self._check_tokens(peer, allowed)
        return compare(self.logits_TV, found, allowed)

    def _check_tokens(self, peer: Peer, allowed: float) -> Accuracy:
        """Only the first token: the truth behind later ones would need another prompt."""
        token = peer.ask("greedy", prompt=self.prompt, steps=1)["tokens"][0]
        last = self.logits_TV[-1]
        gap = float((last.max() - last[token]) / (last.max() - last.min()))
        return Accuracy(gap=gap, is_right=gap <= allowed)


def compare(true_TV: Any, found_TV: Any, allowed: float) -> Accuracy:
    """Compare logits of the same positions; a constant shift of a row is no error."""
    if found_TV.shape != true_TV.shape:
        words = min(true_TV.shape[-1], found_TV.shape[-1])  # the rest is padding
        true_TV, found_TV = true_TV[..., :words], found_TV[..., :words]
    true = true_TV - true_TV.mean(-1, keepdims=True)
    error = found_TV - found_TV.mean(-1, keepdims=True) - true
    rms = float((error**2).mean() ** 0.5 / (true**2).mean() ** 0.5)
    return Accuracy(
        rms_error=round(rms, 5),
        max_error=round(float(abs(error).max()), 4),
        same_top1=float((true.argmax(-1) == found_TV.argmax(-1)).mean()),
        is_right=rms <= allowed,
    )


def _logits(peer: Peer, tokens: list[int]) -> Any:
    import numpy

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits.npy"
        peer.ask("logits", prompt=tokens, is_last_only=False, path=str(path))
        return numpy.load(path)
