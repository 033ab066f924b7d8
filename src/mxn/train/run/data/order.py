"""Which row comes when: a shuffle that answers for any place without making the whole order.

A resumed or re-planned job asks for the row at a place and gets the same one; nothing is stored,
and no library's generator decides. Start at `shuffled`.
"""

from __future__ import annotations

import hashlib

_ROUNDS = 6


def shuffled(place: int, count: int, *, seed: int, epoch: int) -> int:
    """Return the number of the row at `place` of an epoch: a permutation of 0 … count - 1.

    A Feistel network over the next even power of two; results beyond `count` go through again.
    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains", section 3 and 4.
    """
    if not 0 <= place < count:
        raise IndexError(f"place {place} of {count}")
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    key = f"{seed}:{epoch}:{count}:"
    value = place
    while True:
        value = _permute(value, half_bits, key)
        if value < count:
            return value


def _permute(value: int, half_bits: int, key: str) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for number in range(_ROUNDS):
        digest = hashlib.blake2b(f"{key}{number}:{right}".encode(), digest_size=8).digest()
        left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
    return left << half_bits | right
