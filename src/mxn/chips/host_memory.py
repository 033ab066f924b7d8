"""Memory of this machine that this process may use: the system's, cut by its control groups.

Reads control groups of version 1 and 2 through a `Probe`. A limit of any group above ours counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mxn.chips.probe import Probe

_ROOT = "/sys/fs/cgroup"


def read(probe: Probe) -> tuple[int, int]:
    """Return free and total bytes that this process may use.

    Page cache that the system would give up counts as free, in the system as in a group.
    """
    free, total = probe.host_memory()
    for limit, used in _limits(probe):
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return free, total


def _limits(probe: Probe) -> list[tuple[int, int]]:
    """Return (limit, bytes in use) of every group around this process that has a limit."""
    found = []
    for line in (probe.read("/proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            found += _walk(probe, _ROOT, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            found += _walk(
                probe, f"{_ROOT}/memory", path,
                "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
            )  # fmt: skip
    return found


def _walk(
    probe: Probe, mount: str, path: str, limit_file: str, used_file: str, cache_key: str
) -> list[tuple[int, int]]:
    """Read the group at `path` and all above it, up to the mount point.

    Inside a container the path may be the host's and not exist here; the mount point itself does.
    """
    found = []
    parts = [part for part in path.split("/") if part and part != ".."]
    for depth in range(len(parts), -1, -1):
        folder = "/".join([mount, *parts[:depth]])
        limit = _number(probe.read(f"{folder}/{limit_file}"))
        if limit is None:  # "max", or no such group
            continue
        used = _number(probe.read(f"{folder}/{used_file}")) or 0
        found.append((limit, max(0, used - _cache(probe, folder, cache_key))))
    return found


def _cache(probe: Probe, folder: str, key: str) -> int:
    for line in (probe.read(f"{folder}/memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def _number(text: str | None) -> int | None:
    return int(text) if text and text.strip().isdigit() else None
