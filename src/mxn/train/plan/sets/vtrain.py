"""vTrain's single-node runs (Bang et al. 2024; MIT) as cases for the predictor. Start at `cases`.

What the file does not say is in the docstring of `cases`. Its times are exactly linear in layers
and in micro-batches, to the last digit, so they were put together from about 32 measured profiles
and measured sums, not measured one by one; `is_composed` shows it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from mxn.train.plan.cluster import Cluster, DeviceGroup, Link
from mxn.train.plan.links import ring_link
from mxn.train.plan.plan import Chunk, Pipeline, Recompute, Stage, TrainPlan
from mxn.train.plan.shape import LayerShape, ModelShape

VOCABULARY = 50257
CHIP = "nvidia-a100-80g"
_NODE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class VtrainCase:
    """One configuration; `measured_s` as the file says."""

    hidden: int
    num_blocks: int
    tp: int
    dp: int
    pp: int
    plan: TrainPlan
    measured_s: float

    @property
    def key(self) -> tuple[int, int, int]:
        """What a profile is made for: hidden size, width, micro-batch."""
        return self.hidden, self.tp, self.plan.micro_batch


def cases(runs_csv: str, *, recompute: Recompute = "none") -> list[VtrainCase]:
    """Return all rows. Embedding and head are layers of their own, on the first and last stage.

    The authors' configuration names GPT with a vocabulary of 50,257, half precision, 1F1B and
    activation recomputation; the last does not fit the times (see `bench/train/fit.py`), so plans
    say `recompute`, by default "none".
    """
    rows = csv.reader(io.StringIO(runs_csv.lstrip("\ufeff")))
    next(rows)
    return [_case([float(v) for v in row], recompute) for row in rows if row]


def _case(row: list[float], recompute: Recompute) -> VtrainCase:
    _, batch, mbs, hidden, _, blocks, seq, tp, dp, pp = (int(v) for v in row[:10])
    pipelines = tuple(
        Pipeline(
            stages=tuple(_stage(p * pp + s, s, pp, blocks, tp, recompute) for s in range(pp)),
            micro_batches=batch // dp // mbs,
        )
        for p in range(dp)
    )
    plan = TrainPlan(
        model=f"gpt-{hidden}-{blocks}",
        num_layers=blocks + 2,
        seq_tokens=seq,
        micro_batch=mbs,
        pipelines=pipelines,
    )
    return VtrainCase(
        hidden=hidden,
        num_blocks=blocks,
        tp=tp,
        dp=dp,
        pp=pp,
        plan=plan,
        measured_s=row[10] / 1e3,
    )


def _stage(number: int, s: int, pp: int, blocks: int, tp: int, recompute: Recompute) -> Stage:
    each = blocks // pp
    first = 0 if s == 0 else 1 + s * each
    end = 1 + (s + 1) * each + (s == pp - 1)
    return Stage(
        group="a100",
        first_device=number * tp,
        chunks=(Chunk(first=first, end=end),),
        tp=tp,
        recompute=recompute,
    )


def shape(hidden: int, blocks: int, seq: int = 1024, heads: int = 16) -> ModelShape:
    """Return GPT in half precision: Korthikanti 2022, eq. 1 and 2, for work and kept bytes."""
    block = LayerShape(
        kind="block",
        params=12 * hidden * hidden + 13 * hidden,
        forward_flop=24.0 * hidden * hidden + 4.0 * seq * hidden,
        activation_bytes=34.0 * hidden + 5.0 * heads * seq,
        output_bytes=2.0 * hidden,
    )
    embedding = LayerShape(
        kind="embedding",
        params=(VOCABULARY + seq) * hidden,
        forward_flop=0.0,
        activation_bytes=2.0 * hidden,
        output_bytes=2.0 * hidden,
    )
    head = LayerShape(
        kind="head",
        params=VOCABULARY * hidden,
        forward_flop=2.0 * hidden * VOCABULARY,
        activation_bytes=6.0 * VOCABULARY,
        output_bytes=4.0,
    )
    return ModelShape(
        name=f"gpt-{hidden}-{blocks}",
        layers=(embedding, *([block] * blocks), head),
        seq_tokens=seq,
    )


def sum_links(tables: Mapping[int, str]) -> dict[int, Link]:
    """Return the links behind the measured all-reduce tables, by number of devices.

    Columns by position: bytes, count, type, nanoseconds, …; the names repeat.
    """
    found: dict[int, Link] = {}
    for members, text in tables.items():
        rows = list(csv.reader(io.StringIO(text)))[1:]
        sums = [(float(row[0]), float(row[3]) / 1e9) for row in rows if row]
        found[members] = ring_link(members, sums, "measured")
    return found


def cluster(case: VtrainCase, links: Mapping[int, Link]) -> Cluster:
    """Return the node with the link that the case's data-parallel sums see."""
    link = links[case.dp if case.dp > 1 else 2]
    group = DeviceGroup(
        name="a100",
        chip=CHIP,
        num_devices=_NODE,
        devices_per_node=_NODE,
        memory_bytes=80 * 10**9,
        node_link=link,
        group_link=link,
        peak_flop_per_s=312e12,
    )
    return Cluster(groups=(group,))


def is_composed(found: list[VtrainCase], tolerance: float = 1e-9) -> bool:
    """Return whether time is linear in micro-batches wherever three or more counts can be compared.

    Measured times are not, to one part in `tolerance`.
    """
    groups: dict[tuple[int, ...], list[tuple[int, float]]] = {}
    for case in found:
        key = (case.hidden, case.num_blocks, case.tp, case.dp, case.pp, case.plan.micro_batch)
        point = (case.plan.pipelines[0].micro_batches, case.measured_s)
        groups.setdefault(key, []).append(point)
    for points in groups.values():
        points.sort()
        slopes = [(t2 - t1) / (m2 - m1) for (m1, t1), (m2, t2) in pairwise(points)]
        if any(abs(slope / slopes[0] - 1) > tolerance for slope in slopes):
            return False
    return True
