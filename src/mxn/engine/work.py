"""What of each sequence goes into a forward pass, and how a pass that fails is made smaller.

Knows chunks and drafts; knows no tensors and no policy. Start at `Work`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mxn.engine.devicecheck import first_line, is_out_of_memory
from mxn.models.lora import Part

if TYPE_CHECKING:
    from mxn.engine.adapters import Adapter
    from mxn.engine.plan import ScheduledSequence
    from mxn.engine.sampler import SamplingState
    from mxn.engine.stepbatch import Chunk

# A single prompt that runs out of memory is halved down to this many tokens before it is given up.
MIN_SPLIT_TOKENS = 8


class Sampled(Protocol):
    """What the runner wants to know of a request: how it samples, whether its prompt is scored."""

    sampling_state: SamplingState
    num_prompt_logprobs: int | None  # alternatives beside each prompt token; None: not wanted
    adapter: Adapter | None  # None: the base model


@dataclass(slots=True)
class Work:
    """One sequence's part of a forward pass."""

    scheduled: ScheduledSequence
    request: Sampled
    chunk: Chunk
    samples: bool
    drafts: Sequence[int] = ()  # the last tokens of `chunk`, guessed


def has_drafts(work: Sequence[Work]) -> bool:
    """Return whether any part carries guesses."""
    return any(part.drafts for part in work)


def without_drafts(part: Work) -> Work:
    """Return the part as it is without its guesses."""
    if not part.drafts:
        return part
    chunk = part.chunk.without_last(len(part.drafts))
    return Work(part.scheduled, part.request, chunk, part.samples)


def rows_of(part: Work) -> Part:
    """Return which adapter the rows of a part go through."""
    adapter, chunk = part.request.adapter, part.chunk
    key = None if adapter is None else adapter.generation
    return Part(key, len(chunk.token_ids), chunk.num_logits)


def can_split(work: Sequence[Work]) -> bool:
    """Return whether `halve` makes anything smaller."""
    return len(work) > 1 or len(work[0].chunk.token_ids) >= 2 * MIN_SPLIT_TOKENS


def halve(work: list[Work]) -> tuple[list[Work], list[Work]]:
    """Return two parts to run one after the other: by sequences, or a single one by its tokens."""
    if len(work) > 1:
        middle = len(work) // 2
        return work[:middle], work[middle:]
    part = work[0]
    first, second = part.chunk.split(len(part.chunk.token_ids) // 2)
    return (
        [Work(part.scheduled, part.request, first, samples=False)],
        [Work(part.scheduled, part.request, second, part.samples)],
    )


def reason_of(error: Exception, part: Work) -> str:
    """Return what to tell the client whose part failed alone."""
    if is_out_of_memory(error):
        context = part.chunk.start + len(part.chunk.token_ids)
        return f"the device ran out of memory at a context of {context} tokens"
    return f"the model failed: {type(error).__name__}: {first_line(error)}"
