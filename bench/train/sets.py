"""The public sets from `tests/data/training`, ready to be predicted. Shared by fit and predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from mxn.train.plan.analytic import ChipNumbers, Roofline, derive_profile
from mxn.train.plan.cluster import Cluster, Link
from mxn.train.plan.plan import Recompute
from mxn.train.plan.predict import Tuning, predict
from mxn.train.plan.profile import ChipProfile, LayerCost
from mxn.train.plan.sets import sailor, vtrain
from mxn.train.plan.shape import ModelShape
from mxn.train.plan.simulate import simulate_plan

DATA = Path(__file__).parents[2] / "tests/data/training"

# How DeepSpeed's pipeline engine and NCCL work, from their sources, not fitted: activations leave
# after the gradient that is due, sums run in one ring.
SAILOR_TUNING = Tuning(late_sends=True, flat_sums=True)


@cache
def sailor_cases() -> list[sailor.SailorCase]:
    folder = DATA / "sailor"
    profiles = {
        tuple(path.stem.split("__")): path.read_text() for path in sorted(folder.glob("*__*.json"))
    }
    return sailor.cases(
        (folder / "measured-plans.csv").read_text(),
        (folder / "llm_info.json").read_text(),
        (folder / "network_coeffs.json").read_text(),
        {(model, chip): text for (model, chip), text in profiles.items()},
    )


def sailor_seconds(case: sailor.SailorCase, tuning: Tuning) -> float:
    return predict(
        case.plan,
        case.shape,
        case.cluster,
        case.profiles,
        memory=sailor.SAILOR_MEMORY,
        tuning=tuning,
    ).iteration_s


def sailor_simulated_seconds(case: sailor.SailorCase, tuning: Tuning) -> float:
    """Return the same from the event simulator."""
    return simulate_plan(
        case.plan,
        case.shape,
        case.cluster,
        case.profiles,
        memory=sailor.SAILOR_MEMORY,
        tuning=tuning,
    ).prediction.iteration_s


@cache
def vtrain_cases(recompute: Recompute) -> list[vtrain.VtrainCase]:
    return vtrain.cases((DATA / "vtrain/single-node-measured.csv").read_text(), recompute=recompute)


@cache
def vtrain_links() -> dict[int, Link]:
    tables = {n: (DATA / f"vtrain/a100-allreduce-gpu{n}.lut").read_text() for n in (2, 4, 8)}
    return vtrain.sum_links(tables)


@cache
def _shape(hidden: int, blocks: int) -> ModelShape:
    return vtrain.shape(hidden, blocks)


@cache
def _cluster(dp: int) -> Cluster:
    case = next(case for case in vtrain_cases("none") if case.dp == dp)
    return vtrain.cluster(case, vtrain_links())


def roofline_seconds(rows: Sequence[vtrain.VtrainCase], roofline: Roofline) -> list[float]:
    """Return the predicted step of each row with profiles derived from the A100's data sheet."""
    known: dict[tuple[int, int, int], dict[str, ChipProfile]] = {}
    found: list[float] = []
    for case in rows:
        shape = _shape(case.hidden, case.num_blocks)
        if case.key not in known:
            chip = ChipNumbers(
                name=vtrain.CHIP,
                peak_flop_per_s=312e12,
                memory_bytes_per_s=2.039e12,
                memory_bytes=80 * 10**9,
                tensor_link=vtrain_links().get(case.tp),
            )
            profile = derive_profile(
                chip,
                shape,
                [case.plan.micro_batch],
                [case.tp],
                roofline=roofline,
                widths={"head": vtrain.VOCABULARY},
            )
            known[case.key] = {vtrain.CHIP: profile}
        found.append(predict(case.plan, shape, _cluster(case.dp), known[case.key]).iteration_s)
    return found


def profile_seconds(
    rows: Sequence[vtrain.VtrainCase], profiles: Mapping[str, Sequence[float]]
) -> list[float]:
    """Return the predicted step of each row with the profiles that were read out of half of them.

    `profiles` is of `fits/vtrain-profiles.json`. A third of a pass is taken as forward: the runs
    cannot tell, and 1F1B hardly cares.
    """
    found: list[float] = []
    for case in rows:
        block, head, embedding, update, ends = profiles["-".join(map(str, case.key))]
        tp, mbs = case.tp, case.plan.micro_batch
        costs = {
            (kind, mbs, tp): LayerCost(forward_s=s / 3, backward_s=2 * s / 3, optimizer_s=o)
            for kind, s, o in (
                ("block", block, update),
                ("head", head, ends / (1 if case.pp > 1 else 2)),
                ("embedding", embedding, ends / (1 if case.pp > 1 else 2)),
            )
        }
        profile = ChipProfile(chip=vtrain.CHIP, costs=costs)
        shape = _shape(case.hidden, case.num_blocks)
        found.append(
            predict(case.plan, shape, _cluster(case.dp), {vtrain.CHIP: profile}).iteration_s
        )
    return found
