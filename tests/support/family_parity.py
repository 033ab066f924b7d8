"""What a decoder of any family must do, against transformers: shared by all ways of running one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mxn.models.base import CausalLM
from support import tiny
from support.paged import Session, greedy

RELATIVE_ERROR = 1e-4  # of the largest logit; float32

Record = Callable[[str, float], None]


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.VOCAB, (count,), generator=generator).tolist()


@torch.inference_mode()
def reference_logits(reference: Any, tokens: list[int]) -> torch.Tensor:
    return reference(torch.tensor([tokens]), use_cache=False).logits[0].float()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert not got.isnan().any(), "the model read memory that was never written"
    return ((got - want).abs().max() / want.abs().max()).item()


@torch.inference_mode()
def check_chunks(reference: Any, model: CausalLM, record: Record) -> None:
    """A prompt in chunks that cross pages, then token by token."""
    tokens = random_tokens(37, seed=2)
    session = Session(model)
    chunks = [tokens[:5], tokens[5:19], *([token] for token in tokens[19:])]
    got = torch.cat([session.step({0: chunk})[0] for chunk in chunks])
    error = relative_error(got, reference_logits(reference, tokens))
    record("decode", error)
    assert error < RELATIVE_ERROR


@torch.inference_mode()
def check_batch(reference: Any, model: CausalLM, record: Record) -> None:
    """Sequences of mixed lengths in one step give the logits of each alone."""
    prompts = {seq: random_tokens(count, seed=seq) for seq, count in enumerate((1, 23, 8, 33))}
    session = Session(model)
    first = session.step({0: prompts[0], 1: prompts[1][:11], 2: prompts[2]})
    # One step holds a decode row, a prefill chunk behind a cache, and a fresh prompt.
    second = session.step({2: [7], 1: prompts[1][11:], 3: prompts[3], 0: [9]})
    got = {
        0: torch.cat((first[0], second[0])),
        1: torch.cat((first[1], second[1])),
        2: torch.cat((first[2], second[2])),
        3: second[3],
    }
    texts = {0: [*prompts[0], 9], 1: prompts[1], 2: [*prompts[2], 7], 3: prompts[3]}
    worst = max(relative_error(got[s], reference_logits(reference, texts[s])) for s in texts)
    record("batch", worst)
    assert worst < RELATIVE_ERROR


@torch.inference_mode()
def check_greedy(reference: Any, model: CausalLM) -> None:
    """The greedy tokens are those of transformers over 64 steps."""
    prompt = random_tokens(11, seed=5)
    want = reference.generate(
        torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[0, len(prompt):].tolist()  # fmt: skip
    assert greedy(model, prompt, 64) == want
