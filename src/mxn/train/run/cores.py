"""Which cores a rank's threads may use, when a job asks that its ranks stay on cores of their own.

On a busy machine the scheduler puts two ranks on one core while other work holds the next one, for
long enough to blur their speeds. Pure; knows no processes. Start at `assign`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mxn.errors import CapacityError


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What one rank wants: `share` is the part of a core that each of its threads uses."""

    threads: int = 1
    share: float = 1.0


def assign(wishes: Sequence[Wish | None], cores: Sequence[int]) -> list[frozenset[int] | None]:
    """Return the cores of each rank; None for a rank without a wish.

    A rank with several threads gets whole cores. Ranks with one thread share a core as long as
    their shares fit: the largest first, each to the core with the most room.
    Raises: CapacityError when they do not fit.
    """
    room = dict.fromkeys(cores, 1.0)
    found: list[frozenset[int] | None] = [None] * len(wishes)
    asked = [(rank, wish) for rank, wish in enumerate(wishes) if wish is not None]
    for rank, wish in sorted(asked, key=lambda one: (-one[1].threads, -one[1].share, one[0])):
        need = 1.0 if wish.threads > 1 else min(1.0, wish.share)
        open_cores = sorted(
            (core for core, left in room.items() if left >= need - 1e-9),
            key=lambda core: (-room[core], core),
        )
        if len(open_cores) < wish.threads:
            raise CapacityError(
                f"rank {rank} wants {wish.threads} x {need:g} of a core for itself, and of "
                f"{len(room)} cores {sum(room.values()):.2f} are free in pieces of at most "
                f"{max(room.values(), default=0.0):.2f}",
                hint="leave out `pin`, or give the job fewer or slower ranks",
            )
        taken = open_cores[: wish.threads]
        for core in taken:
            room[core] -= need
        found[rank] = frozenset(taken)
    return found
