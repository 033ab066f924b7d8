"""Which replica has seen the beginning of a prompt: hashes of prefixes → replicas, bounded.

A prompt is cut at fixed places, close together at first and further apart later, so that a prompt
of 100,000 tokens costs a few hundred hashes. A wrong guess costs a prefill, never a wrong answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

# (up to this many tokens, tokens in a block)
_STEPS = ((512, 16), (4096, 64), (1 << 62, 256))


def blocks(num_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of the blocks of a prompt; a tail that fills no block is left out."""
    begin = 0
    for limit, size in _STEPS:
        while begin < limit:
            if begin + size > num_tokens:
                return
            yield begin, begin + size
            begin += size


def chain(prompt_ids: Sequence[int], salt: str | None = None) -> list[tuple[int, int]]:
    """Return (hash of everything up to here, tokens up to here) for each block.

    `salt` tells apart what has pages of its own, such as an adapter.
    """
    key = hash(salt)
    hashes = []
    for begin, end in blocks(len(prompt_ids)):
        key = hash((key, *prompt_ids[begin:end]))
        hashes.append((key, end))
    return hashes


class Affinity:
    """At most `capacity` prefixes, the least recently used forgotten first."""

    def __init__(self, capacity: int = 65_536, replicas_each: int = 4) -> None:
        self._capacity = capacity
        self._replicas_each = replicas_each
        self._replicas: OrderedDict[int, tuple[str, ...]] = OrderedDict()  # newest first

    def __len__(self) -> int:
        return len(self._replicas)

    def match(self, hashes: Iterable[tuple[int, int]]) -> dict[str, int]:
        """Return how many tokens at the beginning each replica has probably kept."""
        found: dict[str, int] = {}
        for key, num_tokens in hashes:
            replicas = self._replicas.get(key)
            if replicas is None:
                break
            for replica in replicas:
                found[replica] = num_tokens
        return found

    def note(self, hashes: Sequence[tuple[int, int]], replica: str) -> None:
        """Remember that `replica` computes this prompt."""
        known = self._replicas
        for key, _ in reversed(hashes):  # the beginning is the newest, so a prompt loses its end
            before = known.get(key, ())
            if not before or before[0] != replica:
                others = tuple(item for item in before if item != replica)
                known[key] = (replica, *others[: self._replicas_each - 1])
            known.move_to_end(key)
        while len(known) > self._capacity:
            known.popitem(last=False)

    def forget(self, replica: str) -> None:
        """Drop a replica that is gone or lost its pages."""
        for key in [key for key, names in self._replicas.items() if replica in names]:
            rest = tuple(item for item in self._replicas[key] if item != replica)
            if rest:
                self._replicas[key] = rest
            else:
                del self._replicas[key]
