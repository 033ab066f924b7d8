"""Tensors of a device to and from host memory, chunk by chunk, beside what the device computes.

Copies run on a stream of their own, so that the network can take one chunk while the next is
copied. Knows tensors and one device; knows nothing of ranks or messages. Start at `Staging`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 20
"""Of a message that one side stages. Large enough for the link's rate, small enough to overlap the
copies; a message from host memory to host memory goes whole."""


class HostBuffers:
    """Host memory that is used again: pinned where the device has pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._is_pinned = device.type != "cpu"
        self._free: dict[int, list[Tensor]] = {}
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Tensor:
        """Return uint8 memory of exactly `num_bytes`; its content is anything."""
        with self._lock:
            waiting = self._free.get(num_bytes)
            if waiting:
                return waiting.pop()
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)

    def give_back(self, buffer: Tensor) -> None:
        with self._lock:
            self._free.setdefault(buffer.numel(), []).append(buffer)


class Staging:
    """The copies between `device` and host memory. On the processor there is nothing to copy."""

    def __init__(self, device: torch.device) -> None:
        self.buffers = HostBuffers(device)
        self._stream = None if device.type == "cpu" else torch.Stream(device=device)

    def to_host(
        self, tensor: Tensor, dtype: torch.dtype, ready: torch.Event | None
    ) -> tuple[Tensor, list[torch.Event | None]]:
        """Return host bytes that fill up in the background, and per chunk the event to wait for.

        `ready`: the moment from which `tensor` may be read, see `record`.
        """
        if tensor.device.type == "cpu":
            host = as_bytes(tensor.to(dtype))
            return host, [None] * len(chunks(host))
        assert self._stream is not None
        assert ready is not None
        with self._stream:
            self._stream.wait_event(ready)
            source = as_bytes(tensor.to(dtype))
            host = self.buffers.take(source.numel())
            events: list[torch.Event | None] = []
            for target, chunk in zip(chunks(host), chunks(source), strict=True):
                target.copy_(chunk, non_blocking=True)
                events.append(self._stream.record_event())
        return host, events

    def to_device(
        self,
        host: Tensor,
        target: Tensor,
        dtype: torch.dtype,
        ready: torch.Event | None,
        arrive: Callable[[int], None],
    ) -> None:
        """Fill `target` from host bytes of `dtype`; returns when it is full.

        `arrive(i)` waits until chunk i of `host` is there.
        """
        assert self._stream is not None
        assert ready is not None
        with self._stream:
            self._stream.wait_event(ready)
            is_direct = dtype == target.dtype
            landing = target if is_direct else torch.empty_like(target, dtype=dtype)
            pairs = zip(chunks(host), chunks(as_bytes(landing)), strict=True)
            for number, (source, chunk) in enumerate(pairs):
                arrive(number)
                chunk.copy_(source, non_blocking=True)
            if not is_direct:
                target.copy_(landing)
            self._stream.record_event().synchronize()


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor's memory as uint8 [bytes]."""
    return tensor.reshape(-1).view(torch.uint8)


def chunks(host: Tensor) -> tuple[Tensor, ...]:
    """Return bytes in pieces of CHUNK_BYTES; none of an empty tensor."""
    return host.split(CHUNK_BYTES) if host.numel() else ()


def record(tensor: Tensor) -> torch.Event | None:
    """Return the moment at which `tensor` is ready on the current stream of its device."""
    if tensor.device.type == "cpu":
        return None
    return torch.accelerator.current_stream(tensor.device).record_event()
