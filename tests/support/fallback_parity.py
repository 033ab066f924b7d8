"""Judges the fallback on one architecture: paged logits and greedy tokens against transformers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mxn.errors import UnsupportedError
from mxn.models.load import load_model
from support import any_decoder
from support.paged import Session, greedy

RELATIVE_ERROR = 1e-4  # of the largest logit; float32
GREEDY_TOKENS = 16


@dataclass
class Outcome:
    """What became of one architecture."""

    model_type: str
    architecture: str
    status: Literal["runs", "refused", "failed"]
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)  # of prefill, decode, batch
    max_context: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(model_type: str, directory: Path, device: Any) -> Outcome:
    """Build a tiny random checkpoint, load it through the fallback and compare."""
    name = any_decoder.model_class(model_type).__name__
    try:
        reference = any_decoder.build(model_type)
        probe = reference_logits(reference, random_tokens(9, seed=0))
        if not probe.isfinite().all():
            return Outcome(model_type, name, "failed", "the tiny checkpoint gives no finite logits")
        reference.save_pretrained(directory)
        loaded = load_model(directory, device, "float32", prefer_fallback=True)
    except UnsupportedError as refusal:
        return Outcome(model_type, name, "refused", refusal.message.split(": ", 1)[-1])
    except Exception as error:
        return _not_built(model_type, name, error)
    if loaded.is_native:
        return Outcome(model_type, name, "failed", "loaded natively, not through the fallback")
    errors = compare(reference, loaded.model)
    outcome = Outcome(model_type, name, "runs", "", errors, loaded.max_context)
    wrong = {what: error for what, error in errors.items() if not error <= RELATIVE_ERROR}
    if wrong:
        outcome.status, outcome.reason = "failed", f"relative error {wrong}"
    elif not same_greedy_tokens(reference, loaded.model):
        outcome.status, outcome.reason = "failed", "greedy tokens differ"
    return outcome


def _not_built(model_type: str, name: str, error: Exception) -> Outcome:
    """No tiny checkpoint: refused if the config alone is reason enough, else a failure of ours."""
    from mxn.models.fallback.reasons import why_not

    config = any_decoder.type_of_config(model_type)()
    reason = why_not(config, any_decoder.model_class(model_type))
    if reason:
        return Outcome(model_type, name, "refused", reason)
    return Outcome(model_type, name, "failed", f"{type(error).__name__}: {error}")


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, any_decoder.VOCAB - 8, (count,), generator=generator).tolist()


@torch.inference_mode()
def reference_logits(reference: Any, tokens: list[int]) -> torch.Tensor:
    """Return [T, V] of transformers' own eager attention, without a cache."""
    return reference(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


@torch.inference_mode()
def compare(reference: Any, model: Any) -> dict[str, float]:
    """Return the largest relative error of prefill, of chunks and decode, and of a mixed batch."""
    tokens = random_tokens(29, seed=1)
    want = reference_logits(reference, tokens)
    prefill = relative_error(Session(model).step({0: tokens})[0], want)
    session = Session(model)
    chunks = [tokens[:5], tokens[5:17], *([token] for token in tokens[17:])]
    decode = torch.cat([session.step({0: chunk})[0] for chunk in chunks])
    prompts = {seq: random_tokens(count, seed=seq) for seq, count in enumerate((2, 23, 8, 13))}
    session = Session(model)
    first = session.step({0: prompts[0][:1], 1: prompts[1][:11], 2: prompts[2][:7]})
    # One step holds a decode row, a prefill chunk behind a cache, and a fresh prompt.
    second = session.step(
        {2: prompts[2][7:], 1: prompts[1][11:], 3: prompts[3], 0: prompts[0][1:]}, all_rows=False
    )
    batch = max(
        relative_error(first[1], reference_logits(reference, prompts[1])[:11]),
        *(
            relative_error(second[s][-1], reference_logits(reference, prompts[s])[-1])
            for s in prompts
        ),
    )
    return {"prefill": prefill, "decode": relative_error(decode, want), "batch": batch}


@torch.inference_mode()
def same_greedy_tokens(reference: Any, model: Any) -> bool:
    prompt = random_tokens(11, seed=5)
    got = greedy(model, prompt, GREEDY_TOKENS)
    # One pass over the whole text gives every step's choice of the reference.
    want = reference_logits(reference, prompt + got)[len(prompt) - 1 : -1].argmax(-1).tolist()
    return got == want
