"""What torch expects to find as `torch.sim`: the functions that `torch.cuda` has for CUDA.

torch calls most of these itself (autograd, serialization, random forks, FSDP); code of mxn uses
`torch.accelerator` or asks the chip.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

DeviceLike = torch.device | int | str | None


class SimModule(ModuleType):
    """The module `torch.sim`."""

    Stream = torch.Stream
    Event = torch.Event

    def __init__(self, extension: ModuleType) -> None:
        super().__init__("torch.sim", __doc__)
        self._extension = extension

    def is_available(self) -> bool:
        return self.device_count() > 0

    def is_initialized(self) -> bool:
        return True

    def init(self) -> None:
        """Nothing is left to do once the device is registered."""

    def _is_in_bad_fork(self) -> bool:
        return False  # host memory survives a fork

    def device_count(self) -> int:
        return self._extension.num_devices()

    def current_device(self) -> int:
        return self._extension.current_device()

    def set_device(self, device: DeviceLike) -> None:
        self._extension.set_device(self._index(device))

    def _index(self, device: DeviceLike) -> int:
        if isinstance(device, int):
            return device
        index = None if device is None else torch.device(device).index
        return self.current_device() if index is None else index

    def _exchange_device(self, index: int) -> int:
        before = self.current_device()
        if index >= 0:
            self._extension.set_device(index)
        return before

    _maybe_exchange_device = _exchange_device

    def device(self, device: DeviceLike) -> torch.accelerator.device_index:
        """Return a context manager that makes `device` the current one."""
        return torch.accelerator.device_index(self._index(device))

    def get_device_name(self, device: DeviceLike = None) -> str:
        return f"mxn simulated chip {self._index(device)}"

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    # Random numbers

    def manual_seed(self, seed: int) -> None:
        self._extension.default_generator(self.current_device()).manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        for index in range(self.device_count()):
            self._extension.default_generator(index).manual_seed(seed)

    def get_rng_state(self, device: DeviceLike = None) -> torch.Tensor:
        return self._extension.default_generator(self._index(device)).get_state()

    def set_rng_state(self, state: torch.Tensor, device: DeviceLike = None) -> None:
        self._extension.default_generator(self._index(device)).set_state(state)

    # Streams: everything is synchronous, so they are names

    def synchronize(self, device: DeviceLike = None) -> None:
        torch.accelerator.synchronize(self._index(device))

    def current_stream(self, device: DeviceLike = None) -> torch.Stream:
        return torch.accelerator.current_stream(self._index(device))

    def set_stream(self, stream: torch.Stream) -> None:
        torch.accelerator.set_stream(stream)

    def stream(self, stream: torch.Stream) -> torch.Stream:
        """Return `stream`, which is itself a context manager."""
        return stream

    # Memory

    def mem_get_info(self, device: DeviceLike = None) -> tuple[int, int]:
        """Return free and total bytes."""
        index = self._index(device)
        total = self._extension.memory_bytes(index)
        return max(0, total - self._extension.bytes_now(index)), total

    def memory_allocated(self, device: DeviceLike = None) -> int:
        return self._extension.bytes_now(self._index(device))

    def max_memory_allocated(self, device: DeviceLike = None) -> int:
        return self._extension.bytes_peak(self._index(device))

    def reset_peak_memory_stats(self, device: DeviceLike = None) -> None:
        self._extension.reset_peak(self._index(device))

    def memory_stats(self, device: DeviceLike = None) -> dict[str, Any]:
        return torch.accelerator.memory_stats(self._index(device))

    def empty_cache(self) -> None:
        """Nothing is cached: freed memory is free."""
