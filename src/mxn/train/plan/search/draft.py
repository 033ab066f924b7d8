"""Pipelines before devices are named: what the stages of the search hand to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mxn.train.plan.memory import in_flight
from mxn.train.plan.plan import Schedule
from mxn.train.plan.search.columns import Kind
from mxn.train.plan.search.cuts import Cut
from mxn.train.plan.search.shares import Pace


@dataclass(frozen=True, slots=True)
class Template:
    """One kind of pipeline: a slot and a run of layers per stage, and how fast it would be."""

    kinds: tuple[Kind, ...]
    bounds: tuple[int, ...]  # first layer of each stage, then the end
    sum_s: float
    max_s: float
    after_s: float = 0.0  # gradient sums and optimizer, an estimate

    def pace(self, fill: float = 1.0) -> Pace:
        """Return its pace where a schedule leaves `fill` of 1F1B's filling and draining."""
        return Pace((self.sum_s - self.max_s) * fill + self.after_s, self.max_s)

    @property
    def num_stages(self) -> int:
        return len(self.kinds)


@dataclass(frozen=True, slots=True)
class Style:
    """A schedule, and under the interleaved one the chunks of a stage."""

    schedule: Schedule = "1f1b"
    chunks: int = 1

    @property
    def fill(self) -> float:
        """Which part of 1F1B's filling and draining it leaves, about.

        Zero-bubble leaves forward + backward - 2·weight, which is a third; interleaving a v-th.
        """
        return 1 / 3 if self.schedule == "zero-bubble" else 1 / self.chunks

    def in_flight(self, stage: int, num_stages: int, micro_batches: int) -> float:
        """Return the micro-batches of activations that a stage keeps."""
        return in_flight(self.schedule, stage, num_stages, micro_batches, self.chunks)


@dataclass(frozen=True, slots=True)
class Draft:
    """A set of pipelines with an estimated time; `origin` says what kind of search found it."""

    micro_batch: int
    lines: tuple[tuple[Template, int], ...]  # and how many pipelines of each
    estimate_s: float
    origin: str
    shards_optimizer: bool = False
    style: Style = Style()
    experts: int = 1  # pipelines that share out the experts of a layer
    shares: tuple[int, ...] | None = None  # micro-batches, line by line; None: by the paces

    @property
    def is_flat(self) -> bool:
        """Whether no pipeline has a second stage."""
        return all(line.num_stages == 1 for line, _ in self.lines)

    @property
    def num_pipelines(self) -> int:
        return sum(count for _, count in self.lines)


def template(kinds: Sequence[Kind], cut: Cut, after_s: float) -> Template:
    """Return a cut over numbered kinds as a template."""
    return Template(
        tuple(kinds[number] for number in cut.kinds), cut.bounds, cut.sum_s, cut.max_s, after_s
    )
