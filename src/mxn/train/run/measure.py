"""From a job to what the planner needs of its devices: cluster and profiles, measured or stored.

All ranks of the job are started at once, as in the job, and measure at the same time; what they
find is kept under MXN_HOME/profiles by what it depends on (`measured.layers_key`, `link_key`) and
found there the next time. Start at `measure`.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from mxn.train.plan.cluster import Cluster, DeviceGroup, Link
from mxn.train.plan.links import ring_s
from mxn.train.plan.memory import FLOAT32, MIXED, MemoryModel
from mxn.train.plan.profile import ChipProfile, LayerCost
from mxn.train.plan.shape import ModelShape
from mxn.train.run import stored
from mxn.train.run.job import DeviceSettings, Dtype, Job
from mxn.train.run.measure_start import ask_ranks
from mxn.train.run.measured import (
    Answer,
    Member,
    Model,
    Request,
    basis_of,
    chip_label,
    layers_key,
    link_key,
)
from mxn.train.run.stored import Reading, StoredLink, StoredProfile
from mxn.train.shapes import BYTES

if TYPE_CHECKING:
    from mxn.chips.chip import Device
    from mxn.train.run.weights import ModelSource

log = logging.getLogger("mxn.train")

Progress = Callable[[str], None]
_ROWS_LOOKED_AT = 4  # micro-batches, to see whether any row holds more than one document

_SUMS = 2  # of a block in a team, forward and as many backward, see `net.shard`
Pair = tuple[str, str]  # of group names; twice the same: between two devices of a group


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All that the planner asks of a job's devices."""

    shape: ModelShape
    cluster: Cluster
    profiles: dict[str, ChipProfile]  # by chip label
    stored: dict[str, StoredProfile]  # by chip label: with noise and repeats
    links: dict[Pair, StoredLink]
    memory: MemoryModel
    is_reused: bool  # nothing had to be measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How long to measure. The default takes about 2 s for each kind of layer."""

    blocks: int = 7
    block_s: float = 0.25


def measure(
    job: Job,
    *,
    micro_batches: Sequence[int] = (),
    tps: Sequence[int] = (),
    fresh: bool = False,
    quality: Quality | None = None,
    on_progress: Progress = log.info,
) -> Measured:
    """Return shape, cluster and profiles of a job, measuring what is not stored yet.

    `micro_batches` defaults to the job's; `tps` are widths of tensor parallelism besides 1.
    `fresh` measures everything again.
    Raises: NotFoundError for a device or model that is not there; ConfigError, naming the file, for
    a stored profile that is damaged.
    """
    bench = _Bench(
        job, tuple(sorted(set(micro_batches) or {job.micro_batch})), tps=tuple(sorted({1, *tps}))
    )
    profiles = {} if fresh else bench.stored_profiles()
    links = {} if fresh else bench.stored_links()
    lacks_layers = bench.lacks_layers(profiles)
    lacks_links = [pair for pair in bench.pairs if pair not in links]
    if lacks_layers or lacks_links:
        profiles, links = bench.run(
            profiles, links, has_layers=lacks_layers, quality=quality or Quality(),
            on_progress=on_progress,
        )  # fmt: skip
    return bench.measured(profiles, links, is_reused=not (lacks_layers or lacks_links))


class _Bench:
    """The devices of a job and what is known about them."""

    def __init__(
        self, job: Job, micro_batches: tuple[int, ...], *, tps: tuple[int, ...] = (1,)
    ) -> None:
        from mxn.chips import find_device

        self.job, self.tps = job, tps
        self.micro_batches = micro_batches
        self.model, self.shape, self.is_packed, self.trainable_share = look_at(job)
        self.spec = self.model.spec
        self.members = tuple(_members(job))
        self.devices = {m.rank: find_device(m.device) for m in self.members}
        self.first_rank = {m.group: m.rank for m in reversed(self.members)}
        self.pairs = _pairs(job)

    def device(self, group: DeviceSettings) -> Device:
        return self.devices[self.first_rank[group.name]]

    def label(self, group: DeviceSettings) -> str:
        return chip_label(self.job, group, self.device(group))

    def _layers_key(self, group: DeviceSettings) -> dict[str, Any]:
        company = [
            self.label(self.job.group(m.group))
            for m in self.members
            if _is_on_host(self.devices[m.rank])
        ]
        here = company if _is_on_host(self.device(group)) else []
        return layers_key(
            self.job, group, self.device(group), self.spec, here, is_packed=self.is_packed
        )

    def _link_key(self, pair: Pair) -> dict[str, Any]:
        ranks = self._ranks(pair)
        groups = [self.job.group(name) for name in pair]
        ends = zip(groups, (self.devices[rank] for rank in ranks), strict=True)
        return link_key(self.job, ends)

    def _ranks(self, pair: Pair) -> tuple[int, int]:
        first, second = (self.first_rank[name] for name in pair)
        return (first, second + 1) if first == second else (first, second)

    def stored_profiles(self) -> dict[str, StoredProfile]:
        found = {g.name: stored.load_layers(self._layers_key(g)) for g in self.job.devices}
        return {
            self.label(self.job.group(name)): profile
            for name, profile in found.items()
            if profile is not None
        }

    def stored_links(self) -> dict[Pair, StoredLink]:
        found = {pair: stored.load_link(self._link_key(pair)) for pair in self.pairs}
        return {pair: link for pair, link in found.items() if link is not None}

    def lacks_layers(self, profiles: dict[str, StoredProfile]) -> bool:
        from mxn.train.shapes import layer_kinds

        kinds = set(layer_kinds(self.spec))
        for group in self.job.devices:
            tps = [tp for tp in self.tps if tp <= group.count]
            wanted = set(product(kinds, self.micro_batches, tps))
            profile = profiles.get(self.label(group))
            if profile is None or profile.lacks(wanted):
                return True
        return False

    def run(
        self,
        profiles: dict[str, StoredProfile],
        links: dict[Pair, StoredLink],
        *,
        has_layers: bool,
        quality: Quality,
        on_progress: Progress,
    ) -> tuple[dict[str, StoredProfile], dict[Pair, StoredLink]]:
        """Start all ranks, let them measure, keep what they found."""
        pairs = [pair for pair in self.pairs if pair not in links]
        what = [f"{len(self.members)} devices"] if has_layers else []
        what += [f"{len(pairs)} links"] if pairs else []
        on_progress(f"measuring {' and '.join(what)} …")
        request = Request(
            job=self.job.to_json(), members=self.members, micro_batches=self.micro_batches,
            pairs=tuple(self._ranks(pair) for pair in pairs), blocks=quality.blocks,
            block_s=quality.block_s, is_packed=self.is_packed, has_layers=has_layers,
            tps=self.tps,
        )  # fmt: skip
        answers = ask_ranks(self.job, request, self.model)
        if has_layers:
            profiles = {**profiles, **self._keep_profiles(answers, profiles)}
        return profiles, {**links, **self._keep_links(answers, pairs)}

    def _keep_profiles(
        self, answers: Sequence[Answer], known: dict[str, StoredProfile]
    ) -> dict[str, StoredProfile]:
        by_label: dict[str, list[Answer]] = {}
        group_of: dict[str, DeviceSettings] = {}
        for answer in answers:
            group = self.job.group(self.members[answer.rank].group)
            by_label.setdefault(self.label(group), []).append(answer)
            group_of.setdefault(self.label(group), group)
        kept: dict[str, StoredProfile] = {}
        for label, told in by_label.items():
            group = group_of[label]
            profile = StoredProfile(
                chip=label,
                key=self._layers_key(group),
                readings=middle([answer.readings for answer in told]),
                framework_bytes=max(answer.framework_bytes for answer in told),
                basis=basis_of(group, self.device(group)),
                notes=_notes(group, len(told)),
            )
            before = known.get(label)
            if before is not None:
                both = before.with_readings(profile.readings)
                profile = replace(profile, **both)
            stored.store_layers(profile)
            kept[label] = profile
        return kept

    def _keep_links(
        self, answers: Sequence[Answer], pairs: Sequence[Pair]
    ) -> dict[Pair, StoredLink]:
        found = {
            (told["first"], told["second"]): told for answer in answers for told in answer.links
        }
        kept: dict[Pair, StoredLink] = {}
        for pair in pairs:
            told = found[self._ranks(pair)]
            points = tuple((size, seconds) for size, seconds in told["link"]["points"])
            link = Link(**told["link"] | {"points": points})
            kept[pair] = StoredLink(key=self._link_key(pair), link=link, noise=told["noise"])
            stored.store_link(kept[pair])
        return kept

    def measured(
        self,
        profiles: dict[str, StoredProfile],
        links: dict[Pair, StoredLink],
        *,
        is_reused: bool,
    ) -> Measured:
        groups = tuple(self._group(group, links) for group in self.job.devices)
        between = {pair: kept.link for pair, kept in links.items() if pair[0] != pair[1]}
        return Measured(
            shape=self.shape,
            cluster=Cluster(groups=groups, links=between),
            profiles={
                label: self._with_dtype(self._with_sums(profile.to_chip_profile(), groups))
                for label, profile in profiles.items()
            },
            stored=profiles,
            links=links,
            memory=memory_of(self.job, trainable_share=self.trainable_share),
            is_reused=is_reused,
        )

    def _with_dtype(self, profile: ChipProfile) -> ChipProfile:
        """Say what a group with a dtype of its own keeps, and how wide its values are."""
        dtypes = {g.dtype for g in self.job.devices if self.label(g) == profile.chip}
        dtype = next(iter(dtypes), None)
        if dtype is None or dtype == self.job.dtype:
            return profile
        return replace(
            profile,
            memory=memory_of(self.job, trainable_share=self.trainable_share, dtype=dtype),
            width=BYTES[dtype] / BYTES[self.job.dtype],
        )

    def _with_sums(self, profile: ChipProfile, groups: Sequence[DeviceGroup]) -> ChipProfile:
        """Add to the blocks of a team what their sums take on the slowest link of these chips."""
        links = [g.node_link for g in groups if g.chip == profile.chip and g.num_devices > 1]
        costs = dict(profile.costs)
        for (kind, size, tp), cost in profile.costs.items():
            layer = next((layer for layer in self.shape.layers if layer.kind == kind), None)
            if tp == 1 or layer is None or not kind.startswith("block"):
                continue
            if not links:  # measured for a job of more devices
                del costs[kind, size, tp]
                continue
            num_bytes = layer.output_bytes * self.shape.seq_tokens * size
            sums_s = _SUMS * max(ring_s(tp, num_bytes, link) for link in links)
            costs[kind, size, tp] = replace(
                cost, forward_s=cost.forward_s + sums_s, backward_s=cost.backward_s + sums_s
            )
        return replace(profile, costs=costs)

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
        sharing = sum(d.torch_device == "cpu" for d in self.devices.values())
        return device.memory_bytes // sharing


def look_at(job: Job) -> tuple[Model, ModelShape, bool, float]:
    """Return the model of a job as trainer and planner see it, whether its rows are packed, and
    the share of its weights that is trained.
    """
    from types import SimpleNamespace

    from mxn.train.run.from_job import open_rows, open_source
    from mxn.train.shapes import biases_of, model_shape

    source = open_source(job)
    rows = open_rows(job, source)
    looked_at = min(_ROWS_LOOKED_AT, rows.micro_batches_per_epoch)
    is_packed = any(rows.micro_batch(index).is_packed for index in range(looked_at))
    biases = biases_of(source.family.name, SimpleNamespace(**source.config_json))
    shape = model_shape(
        source.spec, name=source.folder.name, seq_tokens=job.seq_tokens, dtype=job.dtype,
        biases=biases, is_packed=is_packed,
    )  # fmt: skip
    share = 1.0 if job.lora is None else trainable_params(job, source) / shape.params
    model = Model(spec=source.spec, names=source.family.names, biases=source.biases)
    return model, shape, is_packed, share


def trainable_params(job: Job, source: ModelSource) -> int:
    """Return how many weights a LoRA job trains. Takes no memory."""
    from mxn.train.run.lora import LoraSettings, attach
    from mxn.train.run.optim import trainable
    from mxn.train.shapes import layer_kinds

    assert job.lora is not None
    lora = LoraSettings(rank=job.lora.rank, alpha=job.lora.alpha, targets=tuple(job.lora.targets))
    kinds = layer_kinds(source.spec)
    total = 0
    for kind in set(kinds):
        layer = kinds.index(kind)
        stage = source.empty_stage(layer, layer + 1, device="meta")
        attach(stage, lora, seed=job.seed)
        total += kinds.count(kind) * sum(p.numel() for p in trainable(stage).values())
    return total


def memory_of(job: Job, *, trainable_share: float = 1.0, dtype: Dtype | None = None) -> MemoryModel:
    """Return what the trainer keeps for each parameter in a dtype, default the job's."""
    like = FLOAT32 if (dtype or job.dtype) == "float32" else MIXED
    return replace(like, trainable_share=trainable_share)


def middle(rows: Sequence[tuple[Reading, ...]]) -> tuple[Reading, ...]:
    """Return the median over the devices of a group for each case; the noise is the largest."""
    by_case: dict[tuple[str, int, int], list[Reading]] = {}
    for readings in rows:
        for reading in readings:
            by_case.setdefault((reading.kind, reading.micro_batch, reading.tp), []).append(reading)
    return tuple(_middle(by_case[case]) for case in sorted(by_case))


def _middle(alike: list[Reading]) -> Reading:
    def median(name: str) -> float:
        return statistics.median(getattr(reading.cost, name) for reading in alike)

    cost = LayerCost(
        forward_s=median("forward_s"), backward_s=median("backward_s"),
        optimizer_s=median("optimizer_s"), weight_s=median("weight_s"),
        activation_bytes=median("activation_bytes"),
    )  # fmt: skip
    noise = max(reading.noise for reading in alike)
    return replace(alike[0], cost=cost, noise=noise)


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


def _members(job: Job) -> list[Member]:
    found: list[Member] = []
    for group in job.devices:
        kind, _, first = group.device.partition(":")
        for number in range(group.count):
            at = 0 if kind == "cpu" else int(first or 0) + number
            found.append(Member(rank=len(found), group=group.name, device=f"{kind}:{at}"))
    return found


def _pairs(job: Job) -> list[Pair]:
    """Return each two groups, and each group of several devices with itself."""
    names = [group.name for group in job.devices]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return [(g.name, g.name) for g in job.devices if g.count > 1] + pairs


def _is_on_host(device: Device) -> bool:
    """Whether a device computes on the processor: the simulated chip does too."""
    return device.torch_device == "cpu" or device.vendor == "sim"


def _notes(group: DeviceSettings, num_devices: int) -> tuple[str, ...]:
    notes = [f"median of {num_devices} devices"] if num_devices > 1 else []
    if group.cpu_share is not None:
        notes.append(f"a rank limited to {group.cpu_share:g} of a core by cgroup quota")
    return tuple(notes)


def measure_layers(job: Job, *, quality: Quality | None = None) -> Measured:
    """Measure the layers of a job's devices again and store them; links are taken as stored.

    By default quick: the speed check of a job that starts.
    """
    bench = _Bench(job, (job.micro_batch,))
    links = bench.stored_links()
    profiles, links = bench.run(
        {}, links, has_layers=True, quality=quality or Quality(blocks=3, block_s=0.1),
        on_progress=log.info,
    )  # fmt: skip
    return bench.measured(profiles, links, is_reused=False)
