"""The devices of a job and the links between them, as data. Start at `Cluster`.

Devices of a group are numbered from 0 and fill its nodes in order; a group is one chip at one site.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

from mxn.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction between two devices: a latency and a rate, or measured points.

    `points` are (bytes, seconds) with rising bytes. Between them time is linear, below the first it
    is the first's, above the last it grows with `bytes_per_s`. All of this is of bytes on the wire;
    where float32 goes in a narrower dtype, only `float32_share` of a message's bytes do.
    """

    latency_s: float
    bytes_per_s: float
    points: tuple[tuple[float, float], ...] = ()
    basis: str = "assumed"
    float32_share: float = 1.0

    def __post_init__(self) -> None:
        if not (self.bytes_per_s > 0 and self.latency_s >= 0):
            raise UserError(
                f"a link of {self.bytes_per_s!r} bytes/s and {self.latency_s!r} s latency: a rate "
                "is more than 0, a latency at least 0"
            )

    def transfer_s(self, num_bytes: float, *, is_float32: bool = False) -> float:
        """Return the seconds that a message takes; 0 for an empty one.

        `is_float32`: it holds float32, which the link may carry narrower.
        """
        if num_bytes <= 0:
            return 0.0
        if is_float32:
            num_bytes *= self.float32_share
        if not self.points:
            return self.latency_s + num_bytes / self.bytes_per_s
        sizes = [size for size, _ in self.points]
        at = bisect_left(sizes, num_bytes)
        if at == 0:
            return self.points[0][1]
        if at == len(sizes):
            size, seconds = self.points[-1]
            return seconds + (num_bytes - size) / self.bytes_per_s
        (low, low_s), (high, high_s) = self.points[at - 1], self.points[at]
        return low_s + (high_s - low_s) * (num_bytes - low) / (high - low)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceGroup:
    """Devices of one chip that are alike: same memory, same links."""

    name: str
    chip: str
    num_devices: int
    devices_per_node: int
    memory_bytes: int  # that a process may use, of one device
    node_link: Link  # between two devices of a node
    group_link: Link  # between two nodes of the group
    peak_flop_per_s: float | None = None  # of a device, in the dtype of the job; for MFU only
    watts: float | None = None  # of a busy device; None: energy is unknown
    price_micro_per_hour: int | None = None  # of a device, in micro-units of the ledger

    def node_of(self, device: int) -> int:
        return device // self.devices_per_node

    @property
    def num_nodes(self) -> int:
        return -(-self.num_devices // self.devices_per_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """All groups of a job, and the link between each two of them (one entry serves both ways)."""

    groups: tuple[DeviceGroup, ...]
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)

    def group(self, name: str) -> DeviceGroup:
        """Raises: UserError for a name that the cluster does not have."""
        for group in self.groups:
            if group.name == name:
                return group
        names = ", ".join(group.name for group in self.groups)
        raise UserError(f"no group {name!r} in this cluster", hint=f"it has: {names}")

    @property
    def narrows_float32(self) -> bool:
        """Whether any link carries float32 in fewer bytes."""
        inside = (link for g in self.groups for link in (g.node_link, g.group_link))
        return any(link.float32_share != 1 for link in (*inside, *self.links.values()))

    @property
    def num_devices(self) -> int:
        return sum(group.num_devices for group in self.groups)

    def link(self, group_a: str, device_a: int, group_b: str, device_b: int) -> Link:
        """Return the link between two devices. Raises: UserError when two groups have none."""
        if group_a == group_b:
            group = self.group(group_a)
            near = group.node_of(device_a) == group.node_of(device_b)
            return group.node_link if near else group.group_link
        found = self.links.get((group_a, group_b)) or self.links.get((group_b, group_a))
        if found is None:
            raise UserError(
                f"no link between groups {group_a!r} and {group_b!r}",
                hint="measure it with `mxn train profile`, or give it in the cluster file",
            )
        return found
