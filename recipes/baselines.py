"""Two baselines for the shipped models: a unigram and an interpolated Kneser-Ney 5-gram.

Over the same tokens and the same split as the models, so a neural model that does not beat them
has learnt nothing. Knows ids, no text. Run it: `python recipes/baselines.py
src/mxn/shipped/mxn-shakespeare-llama`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

Context = tuple[int, ...]


class Unigram:
    """Relative frequency with one added to each count."""

    def __init__(self, ids: Sequence[int], vocab_size: int) -> None:
        self._counts = Counter(ids)
        self._total = len(ids) + vocab_size

    def probability(self, token: int, context: Context = ()) -> float:
        return (self._counts[token] + 1) / self._total


class KneserNey:
    """Interpolated modified Kneser-Ney of a given order, down to the uniform distribution.

    The highest order counts occurrences, lower orders count distinct left neighbours. Discounts D1,
    D2, D3+ of each order are Chen and Goodman's estimates from the counts of counts.
    Source: Chen & Goodman 1999, "An empirical study of smoothing techniques", section 3.
    """

    def __init__(self, ids: Sequence[int], vocab_size: int, order: int = 5) -> None:
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        self._vocab_size, self._order = vocab_size, order
        self._tables = [self._table(ids, n, is_top=n == order) for n in range(1, order + 1)]
        self._discounts = [self._discount(table) for table in self._tables]
        # For each context: the sum of its counts, and the mass that its discounts set free.
        self._totals = [
            {context: self._mass(counts, discount) for context, counts in table.items()}
            for table, discount in zip(self._tables, self._discounts, strict=True)
        ]

    @staticmethod
    def _table(ids: Sequence[int], n: int, *, is_top: bool) -> dict[Context, Counter[int]]:
        table: dict[Context, Counter[int]] = defaultdict(Counter)
        width = n if is_top else n + 1
        grams = zip(*(ids[i:] for i in range(width)), strict=False)
        for gram in grams if is_top else set(grams):
            table[tuple(gram[-n:-1])][gram[-1]] += 1
        return table

    @staticmethod
    def _discount(table: dict[Context, Counter[int]]) -> tuple[float, float, float]:
        of = Counter(count for counts in table.values() for count in counts.values())
        if not (of[1] and of[2] and of[3]):
            return (0.5, 0.5, 0.5)  # too little text for the estimate
        y = of[1] / (of[1] + 2 * of[2])
        estimates = (k - (k + 1) * y * of[k + 1] / of[k] for k in (1, 2, 3))
        one, two, more = (min(max(d, 0.05), k) for k, d in enumerate(estimates, start=1))
        return one, two, more

    @staticmethod
    def _mass(counts: Counter[int], discount: tuple[float, ...]) -> tuple[int, float]:
        freed = sum(min(discount[min(c, 3) - 1], c) for c in counts.values())
        total = sum(counts.values())
        return total, freed / total

    def probability(self, token: int, context: Context) -> float:
        """Return P(token | last order-1 tokens of `context`)."""
        result = 1.0 / self._vocab_size
        for n in range(1, self._order + 1):
            if len(context) < n - 1:
                break
            known = context[len(context) - n + 1 :]
            counts = self._tables[n - 1].get(known)
            if counts is None:
                break  # an unseen context: longer ones are unseen too
            total, backoff = self._totals[n - 1][known]
            count = counts.get(token, 0)
            kept = max(count - self._discounts[n - 1][min(count, 3) - 1], 0.0) if count else 0.0
            result = kept / total + backoff * result
        return result


def total_nats(model: Unigram | KneserNey, ids: Sequence[int], order: int = 5) -> float:
    """Return the negative log-likelihood of `ids` without its first token."""
    return -sum(
        math.log(model.probability(ids[i], tuple(ids[max(0, i - order + 1) : i])))
        for i in range(1, len(ids))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder with the tokenizer.json to use")
    arguments = parser.parse_args()

    from tokenizers import Tokenizer

    from shakespeare.scores import score_baselines

    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    scores = score_baselines(tokenizer)
    print(json.dumps({name: score.as_dict() for name, score in scores.items()}, indent=2))


if __name__ == "__main__":
    main()
