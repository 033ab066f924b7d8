"""What the ranks of the bridge tests do; see `support.ranks`."""

from __future__ import annotations

import time
from typing import Any

import torch

from mxn.errors import PeerError
from mxn.train.run.bridge import Bridge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64}


def numbers(rank: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
    return made.to(device)


def everybody(bridge: Bridge, shape: list[int], dtype: str = "float32") -> list[float]:
    """Every rank sends to every other one, receives posted in the opposite order of the sends."""
    form, kind = tuple(shape), DTYPES[dtype]
    others = [rank for rank in range(bridge.size) if rank != bridge.rank]
    bridge.open_channels([(a, b, "") for a in range(bridge.size) for b in range(a)])
    incoming = {rank: bridge.recv(form, kind, rank, tag=rank) for rank in reversed(others)}
    mine = (numbers(bridge.rank, form, bridge.device) * 100).to(kind)
    sent = [bridge.send(mine, rank, tag=bridge.rank) for rank in others]
    worst = []
    for rank in others:
        got = incoming[rank].wait()
        assert got.device == bridge.device, got.device
        want = (numbers(rank, form, bridge.device) * 100).to(kind)
        worst.append(float((got - want).abs().max()) if got.numel() else 0.0)
    for handle in sent:
        handle.wait()
    return worst


def two_tags(bridge: Bridge) -> list[float]:
    """Rank 0 sends tag 1, then tag 2; rank 1 takes tag 2 first, before it posts tag 1."""
    if bridge.rank == 0:
        sent = [bridge.send(torch.full((5,), float(t), device=bridge.device), 1, t) for t in (1, 2)]
        return [float(handle.wait()[0]) for handle in sent]
    second = bridge.recv((5,), torch.float32, 0, tag=2).wait()
    first = bridge.recv((5,), torch.float32, 0, tag=1).wait()
    return [float(first[0]), float(second[0])]


def sums(bridge: Bridge, sets: list[list[int]], size: int, rounds: int = 1) -> dict[str, Any]:
    """Sum over each set that this rank is in; returns the bytes of the results and the error."""
    bridge.open_sums(sets)
    result: dict[str, Any] = {}
    for ranks in sets:
        if bridge.rank not in ranks:
            continue
        for number in range(rounds):
            mine = numbers(bridge.rank + 100 * number, (size,), bridge.device)
            total = bridge.sum_(mine, ranks).wait().cpu()
            want = sum(numbers(r + 100 * number, (size,), torch.device("cpu")) for r in ranks)
            result[f"{ranks} {number}"] = {
                "bits": int(total.view(torch.int32).to(torch.int64).sum()),
                "error": float((total - want).abs().max()) if size else 0.0,
            }
    return result


def gathered(bridge: Bridge) -> list[list[float]]:
    return bridge.gather([float(bridge.rank), 0.5])


def never_sent(bridge: Bridge) -> dict[str, Any]:
    """Rank 0 waits for what rank 1 never sends."""
    if bridge.rank == 1:
        time.sleep(bridge.options.timeout_s + 1)
        return {}
    begin_s = time.monotonic()
    try:
        bridge.recv((4,), torch.float32, 1, tag=3, what="activations of micro-batch 7").wait()
    except PeerError as error:
        return {"text": str(error), "rank": error.rank, "s": time.monotonic() - begin_s}
    return {}


def dies(bridge: Bridge) -> dict[str, Any]:
    """Rank 1 leaves without a word; rank 0 waits for it."""
    if bridge.rank == 1:
        bridge.barrier()
        return {}
    bridge.barrier()
    begin_s = time.monotonic()
    try:
        bridge.recv((4,), torch.float32, 1, tag=3, what="gradients of micro-batch 2").wait()
    except PeerError as error:
        return {"text": str(error), "rank": error.rank, "s": time.monotonic() - begin_s}
    return {}


def timed(bridge: Bridge, num_bytes: int, count: int) -> dict[str, float]:
    """Rank 0 sends `count` messages to rank 1, after one to warm up; seconds and what it counted"""
    shape = (num_bytes // 4,)
    mine = torch.zeros(shape, device=bridge.device)
    for number, repeat in enumerate((1, count)):
        bridge.barrier()
        begin_s = time.monotonic()
        for i in range(repeat):
            if bridge.rank == 0:
                bridge.send(mine, 1, tag=number * 1000 + i).wait()
            else:
                bridge.recv(shape, torch.float32, 0, tag=number * 1000 + i).wait()
        took_s = time.monotonic() - begin_s
    peer = bridge.counts[1 - bridge.rank]
    return {"s": took_s, "sent": peer.sent_bytes, "received": peer.received_bytes}
