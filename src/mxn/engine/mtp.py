"""Lets a model guess the tokens behind the next one with its multi-token-prediction layer.

Knows hidden states, pages and the layer; knows no policy (`MtpDrafter` says how many guesses are
wanted) and no verification. Start at `Predictor.predict`. A wrong guess costs time and changes no
token, so whatever is approximate here (the last slot of a shared page, guesses made from guesses)
shows in the rate of acceptance alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from mxn.engine.stepbatch import Chunk, PageRows, pack
from mxn.errors import UnsupportedError
from mxn.models.base import OwnsCache, PredictsAhead

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.engine.draft import MtpDrafter
    from mxn.engine.sequence import Sequence as TokenSequence
    from mxn.kernels.batch import StepBatch
    from mxn.models.base import LayerCache


class PredictingDecoder:
    """A decoder with one more layer of cache, for its prediction layer. Implements `CausalLM`."""

    def __init__(self, decoder: Any) -> None:
        """`decoder` implements `CausalLM` and `PredictsAhead`."""
        self.decoder = decoder
        self.vocab_size = decoder.vocab_size
        self.max_positions = decoder.max_positions
        self.kv_shapes = (*decoder.kv_shapes, decoder.kv_shapes[-1])
        self.dtype, self.device = decoder.dtype, decoder.device
        self.normed_TD: Tensor | None = None  # of the last pass, behind the final norm

    @classmethod
    def wrap(cls, model: Any) -> PredictingDecoder:
        """Return `model` with its prediction layer. Raises: UnsupportedError when it has none."""
        if not isinstance(model, PredictsAhead):
            raise UnsupportedError(
                f"speculation mtp needs a native model family, not a {type(model).__name__}",
                hint="--speculation ngram",
            )
        if not model.mtp:
            family = cast("Any", model).spec.family
            raise UnsupportedError(
                f"speculation mtp: this {family} checkpoint has no prediction layer",
                hint="--speculation ngram",
            )
        return _OwnCache(model) if isinstance(model, OwnsCache) else cls(model)

    def forward(self, batch: StepBatch, cache: list[LayerCache]) -> Tensor:
        """Write the step's keys and values into `cache` and return logits [R, V], float32."""
        logits_RV, self.normed_TD = self.decoder.forward_hidden(batch, cache[:-1])
        return logits_RV


class _OwnCache(PredictingDecoder):
    """One whose decoder has a cache layout of its own. Implements `OwnsCache` too."""

    def page_bytes(self, page_tokens: int) -> int:
        layers = (self.decoder, self.decoder.prediction)
        return sum(part.page_bytes(page_tokens) for part in layers)

    def make_cache(self, num_pages: int, page_tokens: int) -> list[LayerCache]:
        layers = (self.decoder, self.decoder.prediction)
        return [cache for part in layers for cache in part.make_cache(num_pages, page_tokens)]


@dataclass(slots=True)
class Computed:
    """What a pass computed of one sequence, and what came of it."""

    sequence: TokenSequence
    chunk: Chunk
    num_pages: int  # that the sequence holds now
    num_rows: int  # leading rows of the chunk that count: without rejected guesses
    next_id: int  # the token behind the last of them
    samples: bool  # `next_id` was just sampled, so guesses behind it are of use


class Predictor:
    """Runs the prediction layer behind each pass, over the same pages."""

    def __init__(
        self,
        model: PredictingDecoder,
        cache: LayerCache,
        pages: PageRows,
        page_tokens: int,
        drafter: MtpDrafter,
    ) -> None:
        self._model, self._cache, self._pages = model, cache, pages
        self._page_tokens = page_tokens
        self._drafter = drafter

    def predict(self, parts: Sequence[Computed | None], num_rows: Sequence[int]) -> None:
        """Take note of the positions of the last pass and offer guesses where they are wanted.

        `num_rows` counts the rows of each part in that pass; None: the part brought nothing.
        """
        normed_TD = self._model.normed_TD
        assert normed_TD is not None, "a pass goes before"
        rows, computed, first = [], [], 0
        for part, count in zip(parts, num_rows, strict=True):
            if part is not None:
                rows.extend(range(first, first + part.num_rows))
                computed.append(part)
            first += count
        if not computed:
            return
        known = list(zip(computed, self._nums_wanted(computed), strict=True))
        chunks = [
            Chunk(
                part.chunk.table_row, part.chunk.start,
                [*part.chunk.token_ids[1 : part.num_rows], part.next_id], int(wanted > 0),
            )
            for part, wanted in known
        ]  # fmt: skip
        logits_RV, out_TD = self._run(
            chunks, normed_TD[torch.tensor(rows, device=normed_TD.device)]
        )
        ends = torch.tensor([len(chunk.token_ids) for chunk in chunks]).cumsum(0) - 1
        drawn = [index for index, (_, wanted) in enumerate(known) if wanted]
        if drawn:
            last_SD = out_TD[ends[drawn].to(out_TD.device)]
            self._chain([known[index] for index in drawn], logits_RV, last_SD)

    def _nums_wanted(self, parts: list[Computed]) -> list[int]:
        """Return the guesses to make for each part, no more than the next step has room for.

        The scheduler shares that room alike. Where there is none the layer's cache is filled and
        that is all: the head, the largest matrix, would be read for guesses that nobody carries.
        """
        room = self._drafter.max_draft_rows - sum(_num_next_rows(part) for part in parts)
        num_left = sum(part.samples for part in parts)
        nums_wanted = []
        for part in parts:
            wanted = 0
            if part.samples:
                if room > 0:
                    wanted = min(self._num_wanted(part), -(-room // num_left))
                num_left -= 1
            room -= wanted
            nums_wanted.append(wanted)
        return nums_wanted

    def _num_wanted(self, part: Computed) -> int:
        """Return the guesses to make: no more than the pages that are held have slots for."""
        num_tokens = part.chunk.start + part.num_rows + 1
        wanted = self._drafter.wanted(part.sequence, num_tokens)
        return min(wanted, 1 + max(0, part.num_pages * self._page_tokens - num_tokens + 1))

    def _chain(
        self, known: list[tuple[Computed, int]], logits_SV: Tensor, hidden_SD: Tensor
    ) -> None:
        """Guess one token after the other, each from the guess before, and offer them."""
        drafts: list[list[int]] = [[] for _ in known]
        going = list(range(len(known)))
        while True:
            for index, token in zip(going, logits_SV.argmax(-1).tolist(), strict=True):
                drafts[index].append(token)
            kept = [i for i, index in enumerate(going) if len(drafts[index]) < known[index][1]]
            if not kept:
                break
            going = [going[i] for i in kept]
            chunks = []
            for index in going:
                part, made = known[index][0], drafts[index]
                start = part.chunk.start + part.num_rows - 1 + len(made)
                chunks.append(Chunk(part.chunk.table_row, start, [made[-1]], 1))
            hidden_SD = hidden_SD[torch.tensor(kept, device=hidden_SD.device)]
            logits_SV, hidden_SD = self._run(chunks, hidden_SD)
        for (part, _), made in zip(known, drafts, strict=True):
            self._drafter.offer(part.sequence.seq_id, part.chunk.start + part.num_rows + 1, made)

    def _run(self, chunks: list[Chunk], hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        batch = pack(chunks, self._pages, self._page_tokens, self._model.device)
        return self._model.decoder.predict_after_next(hidden_TD, batch, self._cache)


def _num_next_rows(part: Computed) -> int:
    """Return the rows that the next step has of a sequence: its new token, or the prompt's rest."""
    if part.samples:
        return 1
    return max(1, len(part.sequence.token_ids) - part.chunk.start - part.num_rows)
