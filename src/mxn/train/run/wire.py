"""Messages between two ranks through host memory: threads, wire dtype, link limits.

A tensor of any device goes out as chunks: each is copied into pinned host memory while the one
before it is on the network. Nothing here waits in the caller: every peer has a thread of its own
for what it is sent, made when it is first needed. Knows tensors and one torch process group over
host memory; knows nothing of layers, plans or makers. Start at `Wire`.

gloo posts sends and receives at once and matches them by peer and tag, in order within a tag. Its
calls are expected one at a time per group, so posting is done under a lock; waiting is not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mxn.errors import PeerError
from mxn.train.run.background import Background, Handle, Job, Worker
from mxn.train.run.link_limit import LinkLimit, TokenBucket
from mxn.train.run.staging import Staging, as_bytes, chunks, record


@dataclass(slots=True)
class PeerCount:
    """What went to and came from one rank so far. `waited_s`: the caller stood still for it."""

    sent_bytes: int = 0
    received_bytes: int = 0
    sent_messages: int = 0
    received_messages: int = 0
    send_s: float = 0.0  # in the sender's thread, from taking a message to its last byte's leaving
    waited_s: float = 0.0

    def wait_for(self, seconds: float) -> None:
        self.waited_s += seconds


class Wire:
    """Point-to-point messages of this rank over a group of host memory (gloo).

    `device` is where this rank's tensors live. `limit` slows what is sent. Both sides must use the
    same `wire_dtype`, shapes and tags.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        timeout_s: float,
        names: list[str],
        limit: Callable[[int], LinkLimit | None] = lambda peer: None,
        is_plain: Callable[[int], bool] = lambda peer: False,
    ) -> None:
        """`is_plain`: neither this rank nor the peer stages its messages; both must say the same"""
        self.device = device
        self.counts: dict[int, PeerCount] = {}
        self._group, self._timeout_s, self._names = group, timeout_s, names
        self._limit, self._is_plain = limit, is_plain
        self._buckets: dict[int, TokenBucket | None] = {}
        self._workers: dict[str, Worker] = {}
        self._staging = Staging(device)
        self._post = threading.Lock()
        self._lock = threading.Lock()  # of what is counted and made per peer

    def send(
        self, tensor: Tensor, to: int, tag: int, what: str, dtype: torch.dtype | None = None
    ) -> Handle:
        """Send `tensor` as it is; do not write to it before the handle was waited for.

        `dtype` is the one on the wire. The handle's wait returns once the message left.
        """
        tensor = tensor.detach().contiguous()
        sent_dtype = dtype or tensor.dtype
        with self._lock:
            bucket = self._bucket(to)
        self.note(to, tensor.numel() * sent_dtype.itemsize, is_sent=True)
        if tensor.device.type == "cpu" and bucket is None:
            host = as_bytes(tensor.to(sent_dtype))
            works = [self._isend(chunk, to, tag) for chunk in self._chunks(host, to)]
            return Background(self._finish(works, tensor, to, what))
        ready = record(tensor)
        job = self._worker(f"mxn-send-{to}").submit(
            lambda: self._post_staged(tensor, sent_dtype, ready, to, tag, what, bucket)
        )
        return Background(job)

    def recv(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        from_: int,
        tag: int,
        what: str,
        wire_dtype: torch.dtype | None = None,
        lane: str = "",
    ) -> Handle:
        """Post a receive; it fills while the caller computes.

        Receives of one lane must be waited for in the order in which they are posted.
        """
        device = self.device
        sent_dtype = wire_dtype or dtype
        target = torch.empty(shape, dtype=dtype, device=device)
        num_bytes = target.numel() * sent_dtype.itemsize
        self.note(from_, num_bytes, is_sent=False)
        if device.type == "cpu":
            landing = target if sent_dtype == dtype else target.new_empty(shape, dtype=sent_dtype)
            works = [
                self._irecv(chunk, from_, tag) for chunk in self._chunks(as_bytes(landing), from_)
            ]
            return _Posted(self, works, target, from_, what, landing)
        host = self._staging.buffers.take(num_bytes)
        works = [self._irecv(chunk, from_, tag) for chunk in self._chunks(host, from_)]
        ready = record(target)
        job = self._worker(f"mxn-receive-{from_}-{lane}").submit(
            lambda: self._land(works, host, target, sent_dtype, ready, from_, what)
        )
        return Background(job, self.count(from_).wait_for)

    def count(self, peer: int) -> PeerCount:
        return self.counts.setdefault(peer, PeerCount())

    def note(self, peer: int, num_bytes: int, *, is_sent: bool) -> None:
        """Count a message to or from `peer`."""
        with self._lock:
            count = self.count(peer)
            if is_sent:
                count.sent_messages += 1
                count.sent_bytes += num_bytes
            else:
                count.received_messages += 1
                count.received_bytes += num_bytes

    def wait(self, work: Any, peer: int, what: str) -> None:
        """Wait for a posted send or receive. Raises: PeerError naming the peer and the message."""
        begin_s = time.monotonic()
        try:
            work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise self.failure(peer, what, time.monotonic() - begin_s, error) from error

    def failure(self, peer: int, what: str, waited_s: float, error: Exception) -> PeerError:
        name = self._names[peer]
        if waited_s >= self._timeout_s or "imed out" in str(error):
            return PeerError(
                f"{name} did not answer in {self._timeout_s:g} s; waited for {what}",
                rank=peer,
                hint="a longer timeout_s, if a step really takes that long; else see its log",
            )
        reason = str(error).splitlines()[0]
        return PeerError(f"lost {name} while waiting for {what}: {reason}", rank=peer)

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close(timeout_s=1.0)

    def _isend(self, host: Tensor, to: int, tag: int) -> Any:
        with self._post:
            return self._group.send([host], to, tag)

    def _irecv(self, host: Tensor, from_: int, tag: int) -> Any:
        with self._post:
            return self._group.recv([host], from_, tag)

    def _chunks(self, host: Tensor, peer: int) -> tuple[Tensor, ...]:
        return (host,) if self._is_plain(peer) and host.numel() else chunks(host)

    def _bucket(self, peer: int) -> TokenBucket | None:
        if peer not in self._buckets:
            limit = self._limit(peer)
            self._buckets[peer] = TokenBucket(limit) if limit else None
        return self._buckets[peer]

    def _worker(self, name: str) -> Worker:
        with self._lock:
            if name not in self._workers:
                self._workers[name] = Worker(name)
            return self._workers[name]

    def _finish(
        self, works: list[Any], tensor: Tensor, to: int, what: str, host: Tensor | None = None
    ) -> Job:
        """Keep what is being sent until it left; apart from posting, which must not wait."""
        begin_s = time.monotonic()

        def run() -> Tensor:
            for work in works:
                self.wait(work, to, f"it to take {what}")
            if host is not None and tensor.device.type != "cpu":
                self._staging.buffers.give_back(host)
            self.count(to).send_s += time.monotonic() - begin_s
            return tensor

        return self._worker(f"mxn-sent-{to}").submit(run)

    def _post_staged(
        self,
        tensor: Tensor,
        dtype: torch.dtype,
        ready: torch.Event | None,
        to: int,
        tag: int,
        what: str,
        bucket: TokenBucket | None,
    ) -> Job:
        host, copied = self._staging.to_host(tensor, dtype, ready)
        works = []
        for chunk, event in zip(chunks(host), copied, strict=True):
            if event is not None:
                event.synchronize()
            if bucket is not None:
                now_s = time.monotonic()
                time.sleep(max(0.0, bucket.arrival_s(chunk.numel(), now_s) - now_s))
            works.append(self._isend(chunk, to, tag))
        return self._finish(works, tensor, to, what, host)

    def _land(
        self,
        works: list[Any],
        host: Tensor,
        target: Tensor,
        dtype: torch.dtype,
        ready: torch.Event | None,
        from_: int,
        what: str,
    ) -> Tensor:
        def arrive(number: int) -> None:
            self.wait(works[number], from_, what)

        self._staging.to_device(host, target, dtype, ready, arrive)
        self._staging.buffers.give_back(host)
        return target


@dataclass(slots=True)
class _Posted:
    """Receives that gloo does by itself into host memory."""

    wire: Wire
    works: list[Any]
    target: Tensor
    peer: int
    what: str
    landing: Tensor  # as it came over the wire; the target itself where the dtypes are equal

    def wait(self) -> Tensor:
        if self.works:
            begin_s = time.monotonic()
            for work in self.works:
                self.wire.wait(work, self.peer, self.what)
            self.works = []
            self.wire.count(self.peer).waited_s += time.monotonic() - begin_s
            if self.landing is not self.target:
                self.target.copy_(self.landing)
        return self.target

    def is_done(self) -> bool:
        return not self.works
