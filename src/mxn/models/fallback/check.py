"""Compares a fallback decoder with the untouched transformers model before anyone uses it.

Two sequences of different lengths run flattened in one batch, in chunks and token by token, over
pages that hold NaN where nothing was written. So whatever mixes tokens along the batch, misplaces
a position or keeps state elsewhere shows up as a difference. Start at `reference_logits` and
`check`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mxn.errors import UnsupportedError
from mxn.kernels.batch import AttentionBatch, StepBatch
from mxn.models.base import LayerCache

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.models.base import CausalLM
    from mxn.models.spec import KvShape

# RMS of the difference over RMS of the logits. Wrong attention or positions give 0.1 to 1; rounding
# in the compute dtype stays below these.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.15}

_PAGE_TOKENS = 4
_PAGES_PER_SEQUENCE = 3
_LENGTHS = (9, 6)
# Tokens of each sequence by step: a mixed prefill, a chunk beside a decode, then two decodes.
_STEPS = ((5, 3), (3, 1), (1, 1), (0, 1))


def check_tokens(config: Any, num_tokens: int, seed: int) -> list[int]:
    """Return plain token ids: spread over the vocabulary, none that a config gives a meaning."""
    text = config.get_text_config(decoder=True)
    special = {
        value
        for source in (config, text)
        for name, value in source.to_dict().items()
        if name.endswith(("_token_id", "_token_index", "_id")) and isinstance(value, int)
    }
    tokens, candidate = [], 11 + 17 * seed
    while len(tokens) < num_tokens:
        candidate = (candidate * 31 + 7) % text.vocab_size
        while candidate in special:
            candidate = (candidate + 1) % text.vocab_size
        tokens.append(candidate)
        candidate += len(tokens)
    return tokens


def check_sequences(config: Any) -> list[list[int]]:
    return [check_tokens(config, length, seed) for seed, length in enumerate(_LENGTHS)]


@torch.inference_mode()
def reference_logits(model: Any, sequences: list[list[int]], device: torch.device) -> list[Tensor]:
    """Return the logits [T, V] of each sequence alone, by transformers' own eager attention."""
    model.set_attn_implementation("eager")
    results = []
    for tokens in sequences:
        ids = torch.tensor([tokens]).to(device)
        results.append(model(input_ids=ids, use_cache=False).logits[0].float())
    return results


def check(decoder: CausalLM, sequences: list[list[int]], want: list[Tensor]) -> float:
    """Return the relative RMS error of `decoder`.

    Raises: UnsupportedError, with the error and the tolerance, when it is too large.
    """
    cache = [_poisoned_cache(shape, decoder) for shape in decoder.kv_shapes]
    got: list[list[Tensor]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    for counts in _STEPS:
        active = [s for s, count in enumerate(counts) if count]
        batch = _batch(sequences, done, counts, active, decoder.device)
        logits = decoder.forward(batch, cache).split([counts[s] for s in active])
        for s, part in zip(active, logits, strict=True):
            got[s].append(part)
            done[s] += counts[s]
    error = max(
        _relative_rms(torch.cat(parts), reference)
        for parts, reference in zip(got, want, strict=True)
    )
    limit = TOLERANCE[decoder.dtype]
    if not error <= limit:
        raise UnsupportedError(
            f"its logits over the paged cache differ from transformers' own by {error:.3g}"
            f" (relative RMS); the limit for {decoder.dtype} is {limit:g}",
        )
    return error


def _relative_rms(got: Tensor, want: Tensor) -> float:
    return ((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt()).item()


def _poisoned_cache(shape: KvShape, decoder: CausalLM) -> LayerCache:
    size = (len(_LENGTHS) * _PAGES_PER_SEQUENCE, _PAGE_TOKENS, shape.num_heads)
    options = {"dtype": decoder.dtype, "device": decoder.device}
    return LayerCache(
        k=torch.full((*size, shape.k_dim), float("nan"), **options),
        v=torch.full((*size, shape.v_dim), float("nan"), **options) if shape.v_dim else None,
    )


def _batch(
    sequences: list[list[int]],
    done: list[int],
    counts: tuple[int, ...],
    active: list[int],
    device: torch.device,
) -> StepBatch:
    """Build the step that adds `counts` tokens to the active sequences."""
    ids, positions, slots, starts, contexts = [], [], [], [0], []
    for s in active:
        pages = _pages(s)
        for position in range(done[s], done[s] + counts[s]):
            ids.append(sequences[s][position])
            positions.append(position)
            page = pages[position // _PAGE_TOKENS]
            slots.append(page * _PAGE_TOKENS + position % _PAGE_TOKENS)
        starts.append(len(ids))
        contexts.append(done[s] + counts[s])

    def tensor(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device)

    attention = AttentionBatch(
        query_starts=starts,
        context_lens=contexts,
        page_table_SP=tensor([_pages(s) for s in active]),
        context_lens_S=tensor(contexts),
        query_starts_S1=tensor(starts),
        slots_T=tensor(slots),
        page_tokens=_PAGE_TOKENS,
    )
    return StepBatch(tensor(ids), tensor(positions), attention, tensor(list(range(len(ids)))))


def _pages(sequence: int) -> list[int]:
    """Pages of a sequence, interleaved with those of the others and in falling order."""
    last = len(_LENGTHS) * _PAGES_PER_SEQUENCE - 1
    return [last - sequence - i * len(_LENGTHS) for i in range(_PAGES_PER_SEQUENCE)]
