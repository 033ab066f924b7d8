"""Sailor's measured plans (Strati et al. 2025; MIT) as cases for the predictor. Start at `cases`.

Takes the files' text, gives plans, clusters and profiles. Does not correct the data: a case says
what is wrong with it in `fault`, and profiles are as published but for two rules, said in `_costs`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mxn.errors import UserError
from mxn.train.plan.cluster import Cluster, DeviceGroup, Link
from mxn.train.plan.links import quadratic_link
from mxn.train.plan.memory import MemoryModel
from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.plan.profile import ChipProfile, LayerCost
from mxn.train.plan.shape import LayerShape, ModelShape

SEQ_TOKENS = 2048
LATENCY_S = 20e-6  # of a message between nodes; the fits say nothing below 0.1 MB
_MEMORY = {"GH-96": 96, "RTX-3090": 24, "RTX-2080": 11, "Titan-RTX": 24, "A100-40": 40}  # GB

# Float32 under DeepSpeed: weights, a communication copy and an extra copy; gradients; two moments.
SAILOR_MEMORY = MemoryModel(weight_bytes=12, grad_bytes=4, optimizer_bytes=8, reduce_bytes=4)
FRAMEWORK_BYTES = 5.06e9

Costs = Mapping[str, Any]
"""A profile file: micro-batch, tensor-parallel width, layer, [forward, backward, update] in s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SailorCase:
    """One measured plan. Seconds of an iteration, bytes of the fullest device."""

    name: str
    plan: TrainPlan
    shape: ModelShape
    cluster: Cluster
    profiles: Mapping[str, ChipProfile]
    measured_s: float
    measured_reduce_s: float
    measured_bytes: float
    is_mixed: bool
    fault: str = ""  # why the row cannot be scored


def cases(
    plans_csv: str,
    model_json: str,
    links_json: str,
    profiles_json: Mapping[tuple[str, str], str],
) -> list[SailorCase]:
    """Return all rows of the plans file. `profiles_json` is by model and chip.

    A model without a profile on a chip of its plan (GPT-Neo on GH200: the published file is a copy
    of OPT's) gets one that is derived, see `_derived`; such rows have the basis `derived`.
    Raises: UserError for a plan that names a chip without profile and without a way to derive it.
    """
    sizes = json.loads(model_json)
    links = json.loads(links_json)["inter"]
    tables: dict[tuple[str, str], Costs] = {k: json.loads(v) for k, v in profiles_json.items()}
    rows = csv.DictReader(io.StringIO(plans_csv))
    return [_case(row, sizes, links, tables) for row in rows]


def _case(
    row: Mapping[str, str],
    sizes: Mapping[str, Any],
    links: Mapping[str, Any],
    tables: Mapping[tuple[str, str], Costs],
) -> SailorCase:
    model = row["model"]
    stages = [_stage(text) for text in row["stages"].split("; ")]
    num_layers = sum(layers for layers, _ in stages)
    shape = _shape(model, sizes[model])
    if num_layers != shape.num_layers:
        shape = _shape("OPT-350", sizes["OPT-350"])
    plan = _plan(row, stages, num_layers)
    widths = {chip: tp for _, replicas in stages for chip, tp in replicas}
    mbs = int(row["mbs"])
    return SailorCase(
        name=row["case"],
        plan=plan,
        shape=shape,
        cluster=_cluster(stages, links),
        profiles={
            chip: _profile(shape.name, chip, mbs, tp, tables, sizes) for chip, tp in widths.items()
        },
        measured_s=float(row["real_iter_s"]),
        measured_reduce_s=float(row["grad_allreduce_s"]),
        measured_bytes=float(row["max_mem_bytes"]),
        is_mixed=len(widths) > 1,
        fault=_fault(row, num_layers),
    )


def _fault(row: Mapping[str, str], num_layers: int) -> str:
    if row["model"] == "GPT-Neo-2.7" and num_layers == 26:
        return "named GPT-Neo but has OPT's 26 layers, and its reduce time equals its total"
    if row["model"] == "GPT-Neo-2.7":
        return "no profile of GPT-Neo on GH200 was published (the file is a copy of OPT's)"
    return ""


def _stage(text: str) -> tuple[int, list[tuple[str, int]]]:
    """Return layers and (chip, tensor-parallel width) of each replica: "5L@8xRTX-3090-tp8|…"."""
    layers, _, replicas = text.partition("L@")
    found: list[tuple[str, int]] = []
    for replica in replicas.split("|"):
        chip, _, tp = replica.partition("x")[2].rpartition("-tp")
        found.append((chip, int(tp)))
    return int(layers), found


def _plan(
    row: Mapping[str, str], stages: list[tuple[int, list[tuple[str, int]]]], num_layers: int
) -> TrainPlan:
    """Return the plan: replica i of each stage is pipeline i; each replica has its own node."""
    taken: dict[str, int] = {}
    columns: list[list[Stage]] = [[] for _ in range(int(row["dp"]))]
    at = 0
    for layers, replicas in stages:
        for column, (chip, tp) in zip(columns, replicas, strict=True):
            chunk = Chunk(first=at, end=at + layers)
            start = taken.get(chip, 0)
            column.append(Stage(group=chip, first_device=start, tp=tp, chunks=(chunk,)))
            taken[chip] = start + tp
        at += layers
    return TrainPlan(
        model=row["model"],
        num_layers=num_layers,
        seq_tokens=SEQ_TOKENS,
        micro_batch=int(row["mbs"]),
        pipelines=tuple(
            Pipeline(stages=tuple(column), micro_batches=int(row["num_micro"]))
            for column in columns
        ),
    )


def _cluster(stages: list[tuple[int, list[tuple[str, int]]]], links: Mapping[str, Any]) -> Cluster:
    """Return one group per chip, one node per replica.

    The fits are of a whole node with so many of its devices sending, so a device gets its share.
    A link between two chips is the slower of both nodes' own: the published fits of pairs
    contradict each other (RTX-2080 to Titan-RTX: 0.115 and 2.858 GB/s).
    """
    used = [(chip, tp) for _, replicas in stages for chip, tp in replicas]
    own = {
        chip: _node_share(links[chip][str(tp)][0], links[chip][str(tp)][1], tp) for chip, tp in used
    }
    groups = [
        DeviceGroup(
            name=chip,
            chip=chip,
            num_devices=sum(tp for other, tp in used if other == chip),
            devices_per_node=next(tp for other, tp in used if other == chip),
            memory_bytes=_MEMORY[chip] * 10**9,
            node_link=own[chip],  # never crossed: a replica fills its node
            group_link=own[chip],
        )
        for chip in sorted(own)
    ]
    pairs = {
        (a, b): max(own[a], own[b], key=lambda link: link.transfer_s(1e7))
        for a in own
        for b in own
        if a < b
    }
    return Cluster(groups=tuple(groups), links=pairs)


def _node_share(coefficients: list[float], plateau: float, sharing: int) -> Link:
    c2, c1, c0 = (c / sharing for c in coefficients)
    return quadratic_link((c2, c1, c0), plateau / sharing, latency_s=LATENCY_S)


def _shape(model: str, sizes: Mapping[str, Any]) -> ModelShape:
    """Return the model's shape in float32; the last entry holds a matrix tied to the first's."""
    table = sizes["1"]
    last = len(table) - 1
    layers: list[LayerShape] = []
    for at in range(len(table)):
        entry = table[str(at)]
        params = int(entry["params_floats"])
        hidden = entry["act_output_floats"] / SEQ_TOKENS if 0 < at < last else 0.0
        flop = 0.0 if at == 0 else 2.0 * params + 4.0 * SEQ_TOKENS * hidden
        layers.append(
            LayerShape(
                kind="embedding" if at == 0 else "head" if at == last else "block",
                params=params,
                forward_flop=flop,
                activation_bytes=4 * entry["act_mem_floats"] / SEQ_TOKENS,
                output_bytes=4 * entry["act_output_floats"] / SEQ_TOKENS,
            )
        )
    return ModelShape(name=model, layers=tuple(layers), seq_tokens=SEQ_TOKENS, is_tied=True)


def _profile(
    model: str,
    chip: str,
    mbs: int,
    tp: int,
    tables: Mapping[tuple[str, str], Costs],
    sizes: Mapping[str, Any],
) -> ChipProfile:
    table = tables.get((model, chip))
    basis = "measured"
    if table is None:
        table = _derived(model, chip, tables)
        basis = "derived"
    memory = sizes[model][str(tp)]
    rows = _costs(table, mbs, tp)
    last = len(rows) - 1
    costs: dict[tuple[str, int, int], LayerCost] = {}
    for kind, members in (
        ("embedding", [0]),
        ("block", list(range(1, last))),
        ("head", [last]),
    ):
        mean = [sum(rows[i][k] for i in members) / len(members) for k in range(3)]
        floats = sum(memory[str(i)]["act_mem_floats"] for i in members) / len(members)
        costs[kind, mbs, tp] = LayerCost(
            forward_s=mean[0],
            backward_s=mean[1],
            # One entry is the update of all the weights; Sailor takes one per stage.
            optimizer_s=mean[2] / len(rows),
            activation_bytes=4 * floats * mbs,
        )
    return ChipProfile(chip=chip, costs=costs, framework_bytes=FRAMEWORK_BYTES, basis=basis)


def _costs(table: Costs, mbs: int, tp: int) -> list[list[float]]:
    """Return the times of each layer, none of them longer than at twice the micro-batch.

    A layer of half the rows that takes longer was profiled waiting for the host, between
    synchronisations that a real step does not have.
    """
    rows = _sorted(table[str(mbs)][str(tp)])
    larger = table.get(str(2 * mbs), {}).get(str(tp))
    if larger is None:
        return rows
    return [
        [min(a, b) for a, b in zip(row, more, strict=True)]
        for row, more in zip(rows, _sorted(larger), strict=True)
    ]


def _sorted(layers: Mapping[str, list[float]]) -> list[list[float]]:
    return [layers[key] for key in sorted(layers, key=int)]


def _derived(model: str, chip: str, tables: Mapping[tuple[str, str], Costs]) -> Costs:
    """Return a profile from another chip's, scaled by how the two chips do the other model.

    Raises: UserError when there is no chip with profiles of both models.
    """
    for (other, base), theirs in tables.items():
        if other != model:
            continue
        for (known, here), ours in tables.items():
            reference = tables.get((known, base))
            if here == chip and reference is not None and known != model:
                return _scaled(theirs, ours, reference)
    raise UserError(f"no profile of {model} on {chip}, and none to derive it from")


def _scaled(theirs: Costs, ours: Costs, reference: Costs) -> Costs:
    """Return `theirs` times the ratio of whole models `ours` / `reference`, for each width.

    The ratio is taken at the largest micro-batch that both have: there the chips are compared, at
    smaller ones their hosts.
    """
    result: dict[str, dict[str, dict[str, list[float]]]] = {}
    for mbs in theirs:
        for tp in theirs[mbs]:
            both = [int(m) for m in ours if tp in ours[m] and tp in reference.get(m, {})]
            if not both:
                continue
            at = str(max(both))
            sums = [
                [sum(row[k] for row in _sorted(table[at][tp])) for k in range(3)]
                for table in (ours, reference)
            ]
            ratio = [a / b for a, b in zip(*sums, strict=True)]
            result.setdefault(mbs, {})[tp] = {
                layer: [t * r for t, r in zip(times, ratio, strict=True)]
                for layer, times in theirs[mbs][tp].items()
            }
    return result
