"""Times messages between two ranks over the job's own bridge, at a row of sizes.

All ranks walk through all pairs together, so that one pair at a time talks. A round goes there and
back; half of it is a message. Messages are of a dtype that the bridge leaves as it is, so that a
size is that of what goes over the link. Knows no layers and no files. Start at `time_links`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from mxn.train.plan.cluster import Link
from mxn.train.run.layer_times import spread

if TYPE_CHECKING:
    from mxn.train.run.bridge import Bridge

SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24)
"""Bytes. From a message that is all latency to one that is all rate."""
_BLOCKS = 5
_SLOW_S = 1.0  # of one round: larger messages are then left out


class LinkTimes(NamedTuple):
    """One pair of ranks. `noise`: of the largest message, as in a profile."""

    first: int
    second: int
    link: Link
    noise: float


def time_links(
    bridge: Bridge,
    pairs: Sequence[tuple[int, int]],
    *,
    basis: Callable[[int, int], str],
    synchronize: Callable[[], object],
    block_s: float = 0.1,
) -> list[LinkTimes]:
    """Return a link for each pair whose first rank this is. Every rank calls it with all pairs.

    `block_s`: of one block of rounds; many periods of a quota, as for layers.
    """
    channels = [(a, b, "time") for a, b in pairs] + [(b, a, "time") for a, b in pairs]
    bridge.open_channels(channels)
    found: list[LinkTimes] = []
    for pair in pairs:
        points: list[tuple[float, float]] = []
        noise = 0.0
        for size in SIZES:
            blocks = _time_size(bridge, pair, size, synchronize, block_s)
            points.append((float(size), statistics.median(blocks)))
            noise = spread(blocks) if len(blocks) > 1 else 0.0
            if 2 * points[-1][1] > _SLOW_S:
                break
        if bridge.rank == pair[0]:
            link = link_of(points, basis(*pair))
            share = float32_share(bridge, pair[1])
            found.append(LinkTimes(*pair, replace(link, float32_share=share), noise))
    return found


def link_of(points: Sequence[tuple[float, float]], basis: str) -> Link:
    """Return a link through measured (bytes, seconds): a larger message never takes less time.

    The rate beyond the last point is that of the last two; the latency is the smallest message's.
    """
    rising = [points[0]]
    for size, seconds in points[1:]:
        rising.append((size, max(seconds, rising[-1][1])))
    (low, low_s), (high, high_s) = rising[-2] if len(rising) > 1 else (0.0, 0.0), rising[-1]
    rate = (high - low) / (high_s - low_s) if high_s > low_s else high / high_s
    return Link(latency_s=rising[0][1], bytes_per_s=rate, points=tuple(rising), basis=basis)


def float32_share(bridge: Bridge, peer: int) -> float:
    """Return how many of the bytes of a float32 message go over the link to `peer`."""
    narrow = bridge.wire_dtype(torch.float32, peer)
    return 1.0 if narrow is None else narrow.itemsize / torch.float32.itemsize


def _time_size(
    bridge: Bridge,
    pair: tuple[int, int],
    size: int,
    synchronize: Callable[[], object],
    block_s: float,
) -> list[float]:
    """Return seconds of a message in each block, the same numbers on every rank."""
    probe_s = _seconds(bridge, pair, size, 2, synchronize)
    rounds = max(1, min(1000, round(block_s / max(probe_s, 1e-6))))
    blocks = 1 if probe_s > _SLOW_S else _BLOCKS
    return [_seconds(bridge, pair, size, rounds, synchronize) / 2 for _ in range(blocks)]


def _seconds(
    bridge: Bridge, pair: tuple[int, int], size: int, rounds: int, synchronize: Callable[[], object]
) -> float:
    """Return the mean seconds of a round, as the first of the pair sees it, on every rank."""
    first, second = pair
    bridge.barrier("the next size of a link")
    started = time.perf_counter()
    if bridge.rank in pair:
        # Only float32 is narrowed, and a maker's own collective takes 16 bit too.
        message = torch.zeros(size // 2, dtype=torch.float16, device=bridge.device)
        for _ in range(rounds):
            if bridge.rank == first:
                _send(bridge, message, second)
                _receive(bridge, message, second)
            else:
                _receive(bridge, message, first)
                _send(bridge, message, first)
            synchronize()
    spent = (time.perf_counter() - started) / rounds
    return bridge.gather([spent])[first][0]


def _send(bridge: Bridge, message: torch.Tensor, to: int) -> None:
    bridge.send(message, to, 0, channel="time").wait()


def _receive(bridge: Bridge, like: torch.Tensor, from_: int) -> None:
    bridge.recv(tuple(like.shape), like.dtype, from_, 0, channel="time").wait()
