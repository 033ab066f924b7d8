"""Register `simccl`, the collective backend of the simulated chip, with torch.distributed.

It is gloo over device memory without a copy; see csrc/collectives.cpp.
"""

from __future__ import annotations

import os
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch.distributed as dist

from mxn.chips.sim.device import COLLECTIVE_BACKEND, TORCH_NAME


def register(extension: ModuleType) -> None:
    """Make ``init_process_group("simccl")`` and the automatic choice for `sim` tensors work."""

    def create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
        return extension.collectives_over(_gloo(store, rank, size, timeout))

    dist.Backend.register_backend(COLLECTIVE_BACKEND, create, devices=[TORCH_NAME])


def _gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    # Simulated devices of one group are processes of one machine unless the user names a network.
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    device = (
        dist.ProcessGroupGloo.create_device(interface=interface)
        if interface
        else dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")
    )
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._devices = [device]
    options._timeout = timeout
    # Its own prefix: a group over host and device tensors has a second gloo on the same store.
    return dist.ProcessGroupGloo(dist.PrefixStore(COLLECTIVE_BACKEND, store), rank, size, options)
