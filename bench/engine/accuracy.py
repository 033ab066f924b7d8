"""Is an engine right: its logits against float32 transformers on the same checkpoint.

Where an engine gives no logits, its greedy tokens are looked up in the true logits instead. Knows
no speed. Start at `Truth.make` and `Truth.check`.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import contenders
import numpy
from models import SHAPES
from protocol import Load, Peer, Refused, prompt

TOKENS = 48  # of the prompt whose every position is compared
# How far a right engine may be from float32: so many times as far as plain rounding of the weights
# to as many bits is, in this very model (random weights have no slack, and some shapes make much
# more of an error than others). Eight bits twice: activations are rounded as well.
SLACK = {8: 2.0, 4: 1.5}
ALLOWED_F32 = 1e-3
# The best of many tokens by logits with an error of one standard deviation is about so far from the
# truly best one; any token of a row is 4 away.
STEP_SLACK = 2.0
STEPS = 24
HIGHEST = 0.95  # logits of another model are about 1.4 away


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """`rms_error` is None where there are no logits: then `gap` says how far its tokens are from
    the best ones, as a part of the spread of the true logits."""

    rms_error: float | None = None
    max_error: float | None = None
    same_top1: float | None = None
    gap: float | None = None
    allowed: float
    is_right: bool

    def __str__(self) -> str:
        what = "logit error" if self.rms_error is not None else "distance from the best token"
        found = self.gap if self.rms_error is None else self.rms_error
        return f"{what} {found:.4f}, {self.allowed:.4f} is allowed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """How far decoded tokens are from the best ones: the mean over the steps, in standard
    deviations of the true logits."""

    gap: float
    allowed: float

    @property
    def is_right(self) -> bool:
        return self.gap <= self.allowed


Made = dict[str, tuple[str, list[int]]]
"""By contender: its weights, and the tokens it decoded."""


@dataclass(frozen=True, slots=True)
class Truth:
    """The true logits, and the error of plain rounding to 8 and to 4 bits."""

    prompt: list[int]
    logits_TV: Any
    rounding: dict[int, float]

    @classmethod
    def make(cls, model: Path, peers: Path, threads: int, shape: str) -> Truth:
        """Run float32 transformers, in processes that end before anything is measured.

        The same checkpoint and transformers give the same truth, so it is kept in the model's
        folder. Raises: Failed when transformers cannot run the model.
        """
        tokens = prompt(77, TOKENS, SHAPES[shape]["vocab_size"])
        stored = model / f"truth-{version('transformers')}.npz"
        if not stored.is_file():
            true = _run(model, peers, threads, "f32", tokens)
            errors = {
                f"rounding_{bits}": compare(
                    true, _run(model, peers, threads, f"rounded-{bits}", tokens), 1.0
                ).rms_error
                for bits in SLACK
            }
            partial = stored.with_suffix(".partial.npz")
            numpy.savez(partial, logits_TV=true, **errors)
            partial.rename(stored)
        with numpy.load(stored) as found:
            rounding = {bits: float(found[f"rounding_{bits}"]) for bits in SLACK}
            return cls(tokens, found["logits_TV"], rounding)

    def allowed(self, weights: str) -> float:
        """Return the error that an engine may have with weights in this format."""
        name = weights.partition("/")[0]
        if name == "f32":
            return ALLOWED_F32
        bits = 4 if name.startswith(("int4", "q4")) else 8
        # 6 bits err four times as much as 8: a quarter as many steps.
        factor = 4.0 if name.startswith("int6") else 1.0
        return min(HIGHEST, factor * SLACK[bits] * self.rounding[bits])

    def check(self, peer: Peer, weights: str) -> Accuracy:
        """Compare a loaded engine. Raises: Failed when it breaks."""
        allowed = self.allowed(weights)
        try:
            found = _logits(peer, self.prompt)
        except Refused:
            return self._check_tokens(peer, allowed)
        return compare(self.logits_TV, found, allowed)

    def check_decode(self, model: Path, peers: Path, threads: int, made: Made) -> dict[str, Steps]:
        """Judge greedy tokens that engines decoded after the prompt, one step each.

        Each is looked up in the true logits behind the tokens before it, so a step that read a
        wrong cache shows, which logits of the prompt cannot show. Raises: Failed as `make` does.
        """
        found = {}
        texts = {name: self.prompt + tokens for name, (_, tokens) in made.items()}
        logits = _true_logits(model, peers, threads, texts)
        for name, (weights, tokens) in made.items():
            rows = logits[name][len(self.prompt) - 1 : -1]
            missed = rows.max(-1) - rows[range(len(tokens)), tokens]
            found[name] = Steps(
                gap=round(float((missed / rows.std(-1)).mean()), 4),
                allowed=round(STEP_SLACK * self.allowed(weights), 4),
            )
        return found

    def _check_tokens(self, peer: Peer, allowed: float) -> Accuracy:
        """Only the first token: the truth behind later ones would need another prompt."""
        token = peer.ask("greedy", prompt=self.prompt, steps=1)["tokens"][0]
        last = self.logits_TV[-1]
        gap = float((last.max() - last[token]) / (last.max() - last.min()))
        return Accuracy(gap=gap, allowed=allowed, is_right=gap <= allowed)


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
        allowed=round(allowed, 5),
        is_right=rms <= allowed,
    )


def _run(model: Path, peers: Path, threads: int, weights: str, tokens: list[int]) -> Any:
    return _true_logits(model, peers, threads, {"": tokens}, weights)[""]


def _true_logits(
    model: Path, peers: Path, threads: int, texts: dict[str, list[int]], weights: str = "f32"
) -> dict[str, Any]:
    """Return the logits of transformers for each text, loaded for nothing else."""
    contender = contenders.find(f"transformers:{weights}")
    peer = contenders.peer(contender, peers, threads, None)
    load = Load(
        model=str(model), built=str(model), weights=weights, threads=threads, max_context=1024,
        max_sequences=1, kv_tokens=1024,
    )  # fmt: skip
    try:
        peer.load(load)
        return {name: _logits(peer, tokens) for name, tokens in texts.items()}
    finally:
        peer.stop()


def _logits(peer: Peer, tokens: list[int]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits.npy"
        peer.ask("logits", prompt=tokens, is_last_only=False, path=str(path))
        return numpy.load(path)
