"""What a benchmark asks of an engine: prompts and lengths, the same for everyone. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    prompt_ids: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are all there at the start; `what` is counted: new or prompt tokens."""

    name: str
    requests: tuple[Request, ...]
    what: str

    @property
    def counted_tokens(self) -> int:
        if self.what == "prompt":
            return sum(len(request.prompt_ids) for request in self.requests)
        return sum(request.new_tokens for request in self.requests)


def prefill(vocab_size: int, prompt_tokens: int, concurrency: int, seed: int = 0) -> Workload:
    """Prompts of one length, one new token each."""
    requests = _requests(vocab_size, [(prompt_tokens, 1)] * concurrency, seed)
    return Workload(f"prefill {prompt_tokens} tokens × {concurrency}", requests, "prompt")


def decode(
    vocab_size: int, prompt_tokens: int, new_tokens: int, concurrency: int, seed: int = 1
) -> Workload:
    """Prompts and answers of one length: the best case of a static batch."""
    requests = _requests(vocab_size, [(prompt_tokens, new_tokens)] * concurrency, seed)
    return Workload(f"decode {prompt_tokens}+{new_tokens} × {concurrency}", requests, "new")


def mixed(vocab_size: int, concurrency: int, longest: int, seed: int = 2) -> Workload:
    """Prompts and answers of many lengths, as users send them: 1/4 to 7/4 of the middle."""
    rng = random.Random(seed)
    low, high = max(1, longest // 8), longest
    lengths = [(rng.randint(low, high), rng.randint(low, high)) for _ in range(concurrency)]
    requests = _requests(vocab_size, lengths, seed)
    return Workload(f"mixed {low}..{high} × {concurrency}", requests, "new")


def _requests(vocab_size: int, lengths: list[tuple[int, int]], seed: int) -> tuple[Request, ...]:
    rng = random.Random(seed)
    return tuple(
        Request(tuple(rng.randrange(3, vocab_size) for _ in range(prompt)), new)
        for prompt, new in lengths
    )
