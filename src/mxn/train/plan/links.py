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
    floor_bytes_per_s: float,
    basis: str = "measured",
) -> Link:
    """Return a link from a quadratic fit: GB/s = c2·x² + c1·x + c0 with x = log2 of the size in MB.

    Such fits turn negative for small messages and leave their plateau for large ones, so the rate
    is held between `floor_bytes_per_s` and the plateau, and `latency_s` is the least time. Past
    its top a fit that bends down is held at the top. Raises: UserError for a plateau below 1 B/s.
    """
    if plateau_bytes_per_s < 1:
        raise UserError(f"a link's plateau is {plateau_bytes_per_s!r} bytes/s, expected at least 1")
    c2, c1, c0 = coefficients
    top = -c1 / (2 * c2) if c2 < 0 else math.inf
    points: list[tuple[float, float]] = []
    for size in _FIT_SIZES:
        x = min(math.log2(size / 1e6), top)
        rate = min(max((c2 * x * x + c1 * x + c0) * 1e9, floor_bytes_per_s), plateau_bytes_per_s)
        seconds = max(latency_s, size / rate)
        points.append((size, max(seconds, points[-1][1] if points else 0.0)))
    return Link(
        latency_s=latency_s,
        bytes_per_s=plateau_bytes_per_s,
        points=tuple(points),
        basis=basis,
    )


def ring_s(num_members: int, num_bytes: float, link: Link) -> float:
    """Return the seconds of a ring all-reduce of `num_bytes` on each of `num_members` devices.

    2·(n - 1) rounds of one n-th of the bytes; `link` is the slowest of the ring.
    """
    if num_members < 2 or num_bytes <= 0:
        return 0.0
    return 2 * (num_members - 1) * link.transfer_s(num_bytes / num_members)


def slowest(links: Sequence[Link], num_bytes: float) -> Link | None:
    """Return the link on which a message of `num_bytes` takes longest; None when there is none."""
    return max(links, key=lambda link: link.transfer_s(num_bytes), default=None)


def islands_s(inner: Sequence[tuple[int, Link]], outer: Sequence[Link], num_bytes: float) -> float:
    """Return the seconds of a sum over islands of like devices: inside each, then between leaders.

    `inner` has members and slowest link of each island, `outer` the links between the leaders.
    The islands reduce at the same time; their leaders form a ring on whole messages; handing the
    result out inside is the second half of the inner ring, so it is already counted.
    """
    within = max((ring_s(members, num_bytes, link) for members, link in inner), default=0.0)
    link = slowest(outer, num_bytes / max(len(inner), 1))
    return within if link is None else within + ring_s(len(inner), num_bytes, link)
