"""From a job to what the planner needs of its devices: cluster and profiles, measured or stored.

All ranks of the job are started at once, as in the job, and measure at the same time; what they
find is kept under MXN_HOME/profiles by what it depends on (`measured.layers_key`, `link_key`) and
found there the next time. Start at `measure`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from mxn.train.plan.cluster import Cluster, Link
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.profile import ChipProfile
from mxn.train.plan.shape import ModelShape
from mxn.train.run import stored
from mxn.train.run.answers import middle, notes_of
from mxn.train.run.job import DeviceSettings, Dtype, Job
from mxn.train.run.job_devices import JobDevices, Pair, with_sums
from mxn.train.run.job_model import look_at, memory_of
from mxn.train.run.measure_start import ask_ranks
from mxn.train.run.measured import Answer, Request, basis_of, layers_key, link_key
from mxn.train.run.stored import StoredLink, StoredProfile
from mxn.train.shapes import BYTES

log = logging.getLogger("mxn.train")

Progress = Callable[[str], None]


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
    """How long to measure. The default takes about 2 s for each kind of layer.

    With `seconds` all kinds are measured in turns, and another round begins for that long while
    they are not known to a hundredth.
    """

    blocks: int = 7
    block_s: float = 0.25
    seconds: float = 0.0


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


class _Bench:
    """A job's model and devices, and what is stored of them."""

    def __init__(
        self, job: Job, micro_batches: tuple[int, ...], *, tps: tuple[int, ...] = (1,)
    ) -> None:
        self.job, self.tps = job, tps
        self.micro_batches = micro_batches
        self.model, self.shape, self.is_packed, self.trainable_share = look_at(job)
        self.spec = self.model.spec
        self.devices = JobDevices(job)
        self.pairs, self.label = self.devices.pairs, self.devices.label

    def _layers_key(self, group: DeviceSettings) -> dict[str, Any]:
        devices = self.devices
        return layers_key(
            self.job, group, devices.device(group), self.spec, devices.company(group),
            is_packed=self.is_packed,
        )  # fmt: skip

    def _link_key(self, pair: Pair) -> dict[str, Any]:
        groups = [self.job.group(name) for name in pair]
        ends = (
            (group, self.devices.by_rank[rank])
            for group, rank in zip(groups, self.devices.ranks(pair), strict=True)
        )
        return link_key(self.job, ends)

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
        what = [f"{len(self.devices.members)} devices"] if has_layers else []
        what += [f"{len(pairs)} links"] if pairs else []
        longest = f", for {quality.seconds:g} s if they are not steady" if quality.seconds else ""
        on_progress(f"measuring {' and '.join(what)}{longest * has_layers} …")
        request = Request(
            job=self.job.to_json(), members=self.devices.members, micro_batches=self.micro_batches,
            pairs=tuple(self.devices.ranks(pair) for pair in pairs), blocks=quality.blocks,
            block_s=quality.block_s, seconds=quality.seconds, is_packed=self.is_packed,
            has_layers=has_layers, tps=self.tps,
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
            group = self.job.group(self.devices.members[answer.rank].group)
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
                basis=basis_of(group, self.devices.device(group)),
                notes=notes_of(group, len(told)),
            )
            if (before := known.get(label)) is not None:  # it may have been measured for longer
                profile = before.with_readings(profile.readings)
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
            told = found[self.devices.ranks(pair)]
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
        cluster = self.devices.cluster(links)
        return Measured(
            shape=self.shape,
            cluster=cluster,
            profiles={
                label: with_sums(
                    self._as_used(profile.to_chip_profile()), cluster.groups, self.shape
                )
                for label, profile in profiles.items()
            },
            stored=profiles,
            links=links,
            memory=memory_of(self.job, trainable_share=self.trainable_share),
            is_reused=is_reused,
        )

    def _as_used(self, profile: ChipProfile) -> ChipProfile:
        """Say what groups keep that compute on the processor or in a dtype of their own, how wide
        their values are, and whether sums run beside the backward pass: on a processor they would
        take their time from it.
        """
        groups = [g for g in self.job.devices if self.label(g) == profile.chip]
        dtypes: list[Dtype] = [g.dtype for g in groups if g.dtype] or [self.job.dtype]
        dtype = dtypes[0]
        profile = replace(
            profile, is_float32=dtype == "float32",
            overlaps_sums=bool(groups) and not any(map(self.devices.is_on_host, groups)),
        )  # fmt: skip
        keeps_copies = any(self.devices.device(g).torch_device == "cpu" for g in groups)
        if dtype == self.job.dtype and not keeps_copies:
            return profile
        memory = memory_of(
            self.job, trainable_share=self.trainable_share, dtype=dtype, is_on_host=keeps_copies
        )
        return replace(profile, memory=memory, width=BYTES[dtype] / BYTES[self.job.dtype])
