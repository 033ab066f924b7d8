"""Drive a `CausalLM` by hand: own pages, poisoned caches, any mix of sequences in a step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mxn.kernels.batch import AttentionBatch, StepBatch
from mxn.models.base import CausalLM, LayerCache, OwnsCache


@dataclass
class Session:
    """Some sequences over one paged cache. Pages are dealt in an order that leaves gaps."""

    model: CausalLM
    num_pages: int = 64
    page_tokens: int = 4
    cache: list[LayerCache] = field(init=False)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    pages: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.model, OwnsCache):
            self.page_tokens = 16
            self.cache = self.model.make_cache(self.num_pages, self.page_tokens)
            for layer in self.cache:
                layer.k.fill_(0xFF)  # NaN as float32, as bfloat16 and as a scale
        else:
            self.cache = [self._layer_cache(shape) for shape in self.model.kv_shapes]
        order = torch.randperm(self.num_pages, generator=torch.Generator().manual_seed(3))
        self._free = order.tolist()

    def _layer_cache(self, shape) -> LayerCache:
        def poisoned(dim: int) -> torch.Tensor:
            size = (self.num_pages, self.page_tokens, shape.num_heads, dim)
            host = torch.full(size, float("nan"), dtype=self.model.dtype)
            return host.to(self.model.device)

        return LayerCache(k=poisoned(shape.k_dim), v=poisoned(shape.v_dim) if shape.v_dim else None)

    def step(self, new: dict[int, list[int]], *, all_rows: bool = True) -> dict[int, torch.Tensor]:
        """Add tokens to sequences in one step; return logits per sequence on the CPU."""
        batch, lengths = self._batch(new, all_rows)
        logits = self.model.forward(batch, self.cache).cpu().clone()
        rows = lengths if all_rows else [1] * len(lengths)
        return dict(zip(new, logits.split(rows), strict=True))

    def batch(self, new: dict[int, list[int]]) -> StepBatch:
        """Return the step that adds `new` to the sequences."""
        return self._batch(new, True)[0]

    def _batch(self, new: dict[int, list[int]], all_rows: bool) -> tuple[StepBatch, list[int]]:
        ids, positions, slots, starts, contexts = [], [], [], [0], []
        for seq, tokens in new.items():
            before = len(self.tokens.setdefault(seq, []))
            self.tokens[seq] += tokens
            pages = self.pages.setdefault(seq, [])
            while len(pages) * self.page_tokens < len(self.tokens[seq]):
                pages.append(self._free.pop())
            ids += tokens
            for position in range(before, before + len(tokens)):
                positions.append(position)
                page = pages[position // self.page_tokens]
                slots.append(page * self.page_tokens + position % self.page_tokens)
            starts.append(len(ids))
            contexts.append(len(self.tokens[seq]))
        widest = max(len(self.pages[seq]) for seq in new)
        table = [self.pages[seq] + [0] * (widest - len(self.pages[seq])) for seq in new]
        attention = AttentionBatch(
            query_starts=starts,
            context_lens=contexts,
            page_table_SP=self._tensor(table),
            context_lens_S=self._tensor(contexts),
            query_starts_S1=self._tensor(starts),
            slots_T=self._tensor(slots),
            page_tokens=self.page_tokens,
        )
        rows = None if all_rows else self._tensor([start - 1 for start in starts[1:]])
        lengths = [len(tokens) for tokens in new.values()]
        step = StepBatch(self._tensor(ids), self._tensor(positions), attention, rows)
        return step, lengths

    def _tensor(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.model.device)


def greedy(model: CausalLM, prompt: list[int], count: int, **options) -> list[int]:
    """Return `count` greedy tokens after `prompt`."""
    session = Session(model, **options)
    tokens, new = [], prompt
    for _ in range(count):
        logits = session.step({0: new}, all_rows=False)[0]
        new = [int(logits[-1].argmax())]
        tokens += new
    return tokens
