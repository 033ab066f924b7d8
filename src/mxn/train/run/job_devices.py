"""The devices of a job: who has which rank, what the planner calls them, and its cluster of them.

Knows the job and the chips of this machine; measures nothing. Start at `JobDevices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mxn.train.plan.cluster import Cluster, DeviceGroup, Link
from mxn.train.plan.links import ring_s
from mxn.train.plan.profile import ChipProfile
from mxn.train.plan.shape import ModelShape
from mxn.train.run.job import DeviceSettings, Job
from mxn.train.run.measured import Member, chip_label
from mxn.train.run.stored import StoredLink

if TYPE_CHECKING:
    from mxn.chips.chip import Device

_SUMS = 2  # of a block in a team, forward and as many backward, see `net.shard`
Pair = tuple[str, str]  # of group names; twice the same: between two devices of a group


class JobDevices:
    """The ranks of a job in order, and the device of each.

    Raises: NotFoundError for a device that is not there.
    """

    def __init__(self, job: Job) -> None:
        from mxn.chips import find_device

        self.job = job
        self.members = tuple(members_of(job))
        self.by_rank = {m.rank: find_device(m.device) for m in self.members}
        self.first_rank = {m.group: m.rank for m in reversed(self.members)}
        self.pairs = pairs_of(job)

    def device(self, group: DeviceSettings) -> Device:
        return self.by_rank[self.first_rank[group.name]]

    def label(self, group: DeviceSettings) -> str:
        return chip_label(self.job, group, self.device(group))

    def is_on_host(self, group: DeviceSettings) -> bool:
        """Return whether ranks of `group` compute on this machine's processor."""
        return _is_on_host(self.device(group))

    def company(self, group: DeviceSettings) -> list[str]:
        """Return the labels of all ranks that compute on the processor, if `group` is of them."""
        if not self.is_on_host(group):
            return []
        return [
            self.label(self.job.group(m.group))
            for m in self.members
            if _is_on_host(self.by_rank[m.rank])
        ]

    def ranks(self, pair: Pair) -> tuple[int, int]:
        """Return the two ranks between which the link of `pair` is measured."""
        first, second = (self.first_rank[name] for name in pair)
        return (first, second + 1) if first == second else (first, second)

    def cluster(self, links: dict[Pair, StoredLink]) -> Cluster:
        """Return the job's devices as the planner takes them."""
        between = {pair: kept.link for pair, kept in links.items() if pair[0] != pair[1]}
        groups = tuple(self._group(group, links) for group in self.job.devices)
        return Cluster(groups=groups, links=between)

    def _group(self, group: DeviceSettings, links: dict[Pair, StoredLink]) -> DeviceGroup:
        device = self.device(group)
        near = links.get((group.name, group.name))
        # One device sends itself nothing; a slow link here would be taken for the slowest of all.
        alone = Link(latency_s=0.0, bytes_per_s=1e15, basis="assumed")
        link = near.link if near else alone
        return DeviceGroup(
            name=group.name,
            chip=self.label(group),
            num_devices=group.count,
            devices_per_node=group.count,
            memory_bytes=group.memory_bytes or self._memory(device),
            node_link=link,
            group_link=link,
            peak_flop_per_s=peak_of(device, self.job.dtype_of(group.name), group),
            watts=group.watts if group.watts is not None else watts_of(device),
            price_micro_per_hour=_micro(group.price_per_hour),
        )

    def _memory(self, device: Device) -> int:
        """Ranks on the processor share its memory evenly."""
        if device.torch_device != "cpu":
            return device.memory_bytes
        sharing = sum(d.torch_device == "cpu" for d in self.by_rank.values())
        return device.memory_bytes // sharing


def with_sums(
    profile: ChipProfile, groups: Sequence[DeviceGroup], shape: ModelShape
) -> ChipProfile:
    """Add to the blocks of a team what their sums take on the slowest link of these chips.

    The profile says how wide its values are already: they are summed as they are computed.
    """
    links = [g.node_link for g in groups if g.chip == profile.chip and g.num_devices > 1]
    costs = dict(profile.costs)
    for (kind, size, tp), cost in profile.costs.items():
        layer = next((layer for layer in shape.layers if layer.kind == kind), None)
        if tp == 1 or layer is None or not kind.startswith("block"):
            continue
        if not links:  # measured for a job of more devices
            del costs[kind, size, tp]
            continue
        num_bytes = layer.output_bytes * shape.seq_tokens * size * profile.width
        sums_s = _SUMS * max(ring_s(tp, num_bytes, link) for link in links)
        costs[kind, size, tp] = replace(
            cost, forward_s=cost.forward_s + sums_s, backward_s=cost.backward_s + sums_s
        )
    return replace(profile, costs=costs)


def peak_of(device: Device, dtype: str, group: DeviceSettings) -> float | None:
    """Return the known or measured peak of a device in flop/s, or None; for MFU only."""
    from mxn.chips import measured, specs

    name = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    spec = specs.find(device.chip)
    figure = (spec.best(name) or (spec.best("fp16") if name == "bf16" else None)) if spec else None
    if figure is not None:
        return figure.value * 1e12
    before = measured.load(device.chip)
    reading = before.reading(f"matmul {dtype}") if before else None
    if reading is None:
        return None
    share = group.cpu_share if group.cpu_share is not None else 1.0
    return reading.value * 1e12 * share


def watts_of(device: Device) -> float | None:
    """Return what the catalogue says a busy device takes at most; None where it says nothing."""
    from mxn.chips import specs

    spec = specs.find(device.chip)
    figure = spec.best("power") if spec else None
    return figure.value if figure else None


def _micro(price: float | None) -> int | None:
    return None if price is None else round(price * 1e6)


def members_of(job: Job) -> list[Member]:
    """Return one rank for each device of each group, in the order of the job file."""
    found: list[Member] = []
    for group in job.devices:
        kind, _, first = group.device.partition(":")
        for number in range(group.count):
            at = 0 if kind == "cpu" else int(first or 0) + number
            found.append(Member(rank=len(found), group=group.name, device=f"{kind}:{at}"))
    return found


def groups_of(devices: Sequence[Device]) -> tuple[DeviceSettings, ...]:
    """Return a group for each run of consecutive numbers of one chip.

    A group counts on from its first device (`members_of`), so chips that take turns, such as
    cuda:0 and cuda:2 around another chip, are groups of their own. The first of a chip has its
    name, a later one that and its first number.
    """
    runs: dict[str, list[list[Device]]] = {}
    for device in sorted(devices, key=lambda d: (d.id.partition(":")[0], d.index)):
        of_chip = runs.setdefault(device.chip, [])
        if of_chip and _follows(device, of_chip[-1][-1]):
            of_chip[-1].append(device)
        else:
            of_chip.append([device])
    return tuple(
        DeviceSettings(
            name=f"{chip}-{run[0].index}" if at else chip, device=run[0].id, count=len(run)
        )
        for chip, of_chip in runs.items()
        for at, run in enumerate(of_chip)
    )


def _follows(device: Device, before: Device) -> bool:
    """Return whether a device is of the same type and has the next number."""
    kinds = {one.id.partition(":")[0] for one in (device, before)}
    return len(kinds) == 1 and device.index == before.index + 1


def pairs_of(job: Job) -> list[Pair]:
    """Return each two groups, and each group of several devices with itself."""
    names = [group.name for group in job.devices]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return [(g.name, g.name) for g in job.devices if g.count > 1] + pairs


def _is_on_host(device: Device) -> bool:
    """Return whether a device computes on the processor: the simulated chip does too."""
    from mxn.chips.registry import chip_of

    return device.torch_device == "cpu" or chip_of(device.vendor).is_on_host
