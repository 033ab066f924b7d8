"""What a message costs on a link, and a sum over many devices. Start at `ring_s`.

Knows bytes and `cluster.Link`s. Knows nothing of layers or plans, and nothing of two transfers
that share a wire: each is timed as if alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mxn.errors import UserError
from mxn.train.plan.cluster import Link

_FIT_SIZES = tuple(2.0**power for power in range(10, 35))  # 1 KiB to 16 GiB


def quadratic_link(
    coefficients: tuple[float, float, float],
    plateau_bytes_per_s: float,
    *,
    latency_s: float,
    basis: str = "measured",
) -> Link:
    """Return a link from a quadratic fit: GB/s = c2·x² + c1·x + c0 with x = log2 of the size in MB.

    Such fits turn negative for small messages and leave their plateau for large ones. So the rate
    is held at the plateau, past the top of a fit that bends down at the top; no message takes
    longer than a larger one, and none less than `latency_s`.
    Raises: UserError for a plateau below 1 B/s.
    """
    if plateau_bytes_per_s < 1:
        raise UserError(f"a link's plateau is {plateau_bytes_per_s!r} bytes/s, expected at least 1")
    c2, c1, c0 = coefficients
    top = -c1 / (2 * c2) if c2 < 0 else math.inf
    points: list[tuple[float, float]] = []
    seconds = math.inf
    for size in reversed(_FIT_SIZES):
        x = min(math.log2(size / 1e6), top)
        rate = min((c2 * x * x + c1 * x + c0) * 1e9, plateau_bytes_per_s)
        seconds = min(seconds, size / rate if rate > 0 else math.inf)
        points.append((size, max(seconds, latency_s)))
    return Link(
        latency_s=latency_s,
        bytes_per_s=plateau_bytes_per_s,
        points=tuple(reversed(points)),
        basis=basis,
    )


def ring_s(num_members: int, num_bytes: float, link: Link, *, is_float32: bool = False) -> float:
    """Return the seconds of a ring all-reduce of `num_bytes` on each of `num_members` devices.

    2·(n - 1) rounds of one n-th of the bytes; `link` is the slowest of the ring. `is_float32` as in
    `Link.transfer_s`.
    """
    if num_members < 2 or num_bytes <= 0:
        return 0.0
    part_s = link.transfer_s(num_bytes / num_members, is_float32=is_float32)
    return 2 * (num_members - 1) * part_s


def slowest(links: Sequence[Link], num_bytes: float, *, is_float32: bool = False) -> Link | None:
    """Return the link on which a message of `num_bytes` takes longest; None when there is none."""

    def seconds(link: Link) -> float:
        return link.transfer_s(num_bytes, is_float32=is_float32)

    return max(links, key=seconds, default=None)


def ring_link(num_members: int, sums: Sequence[tuple[float, float]], basis: str) -> Link:
    """Return the link on which a ring of `num_members` takes what was measured of whole sums.

    `sums` are (bytes, seconds) with rising bytes. Below the first, time is the first's.
    Raises: UserError for fewer than two members or sums.
    """
    if num_members < 2 or len(sums) < 2:
        raise UserError(f"{len(sums)} sums over {num_members} devices make no link, 2 and 2 do")
    rounds = 2 * (num_members - 1)
    points = tuple((size / num_members, seconds / rounds) for size, seconds in sums)
    (size, seconds), (last_size, last_s) = points[0], points[-1]
    return Link(
        latency_s=seconds,
        bytes_per_s=(last_size - size) / (last_s - seconds),
        points=points,
        basis=basis,
    )
