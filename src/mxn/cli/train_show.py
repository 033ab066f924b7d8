"""How `mxn train` shows profiles, plans and predictions: as lines for people, as dicts for JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mxn.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from mxn.train.plan.bounds import Bounds
    from mxn.train.plan.explain import Explanation
    from mxn.train.plan.plan import Pipeline, TrainPlan
    from mxn.train.plan.prediction import Prediction
    from mxn.train.plan.search.choices import Candidate, Found
    from mxn.train.plan.simulate import Simulation
    from mxn.train.run.measure import Measured
    from mxn.train.run.prepare import Task
    from mxn.train.run.stored import StoredLink, StoredProfile

_LARGE = 1 << 20  # bytes of the message that a link's rate is shown for


def profile_lines(measured: Measured) -> Iterator[str]:
    """Say what each kind of layer costs on each chip, and each link, in the order of the job."""
    for label, profile in measured.stored.items():
        groups = [g.name for g in measured.cluster.groups if g.chip == label]
        yield f"{label}  ({', '.join(groups)}; {profile.basis})"
        yield from _layer_table(profile)
        if stopped := sum(reading.stopped for reading in profile.readings):
            yield f"  left out {stopped} blocks of time in which a process stood still"
        yield f"  framework {format_bytes(profile.framework_bytes)} per process"
        for note in profile.notes:
            yield f"  note: {note}"
        yield ""
    for pair, kept in measured.links.items():
        yield _link_line(pair, kept)


def _layer_table(profile: StoredProfile) -> Iterator[str]:
    head = (
        "kind", "rows", "forward", "backward", "weights", "optimizer", "keeps", "noise", "sure to",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for reading in profile.readings:
        cost = reading.cost
        rows.append((
            reading.kind, str(reading.micro_batch), format_seconds(cost.forward_s),
            format_seconds(cost.backward_s), format_seconds(cost.weight_s or 0.0),
            format_seconds(cost.optimizer_s), format_bytes(cost.activation_bytes or 0.0),
            f"±{reading.noise:.1%}", "-" if reading.error is None else f"±{reading.error:.1%}",
        ))  # fmt: skip
    yield from columns(rows)


def _link_line(pair: tuple[str, str], kept: StoredLink) -> str:
    link = kept.link
    rate = _LARGE / link.transfer_s(_LARGE)
    where = f"{pair[0]} – {pair[1]}" if pair[0] != pair[1] else f"inside {pair[0]}"
    return (
        f"link {where}: {format_seconds(link.latency_s)}, {format_rate(rate, 'B/s')} at 1 MiB, "
        f"{format_rate(link.bytes_per_s, 'B/s')} beyond {format_bytes(link.points[-1][0])} "
        f"(±{kept.noise:.1%}, {link.basis})"
    )


def profile_json(measured: Measured) -> dict[str, Any]:
    return {
        "is_reused": measured.is_reused,
        "profiles": [
            asdict(p) | {"fingerprint": p.fingerprint} for p in measured.stored.values()
        ],
        "links": [
            {"between": list(pair)} | asdict(kept) for pair, kept in measured.links.items()
        ],
    }  # fmt: skip


# -- plans -------------------------------------------------------------------------------------


def plan_lines(plan: TrainPlan, prediction: Prediction, task: Task) -> Iterator[str]:
    """Say who holds which layers, and what a step of it will take."""
    micro = f"{plan.micro_batches} micro-batches of {plan.micro_batch} x {plan.seq_tokens} tokens"
    yield f"plan {plan.fingerprint}: {plan.model}, {micro} a step, {plan.schedule}"
    yield from columns(list(_pipeline_rows(plan)), head=False)
    yield from prediction_lines(prediction)
    yield from _stage_table(plan, prediction)
    for note in task.notes:
        yield f"note: {note}"


def _pipeline_rows(plan: TrainPlan) -> Iterator[tuple[str, ...]]:
    alike: dict[tuple[str, int], list[int]] = {}
    for number, pipeline in enumerate(plan.pipelines):
        alike.setdefault((stages_text(pipeline), pipeline.micro_batches), []).append(number)
    for (stages, micro_batches), numbers in alike.items():
        times = f"{len(numbers)} x " if len(numbers) > 1 else ""
        yield f"{times}pipeline", f"{micro_batches} micro-batches", stages


def stages_text(pipeline: Pipeline) -> str:
    """Return the stages of a pipeline, such as ``fast 0-3 → slow 4-5``."""
    return " → ".join(
        f"{stage.group}"
        + (f" x{stage.tp}" if stage.tp > 1 else "")
        + " "
        + "+".join(f"{chunk.first}-{chunk.end - 1}" for chunk in stage.chunks)
        + (f" ({stage.recompute} recompute)" if stage.recompute != "none" else "")
        for stage in pipeline.stages
    )


def prediction_lines(found: Prediction) -> Iterator[str]:
    """Say what a step takes and of what."""
    yield (
        f"predicted: {format_seconds(found.iteration_s)} a step, "
        f"{found.tokens_per_s:,.0f} tokens/s ({found.basis})"
    )
    yield (
        f"  pipelines {format_seconds(found.pipeline_s)}, gradient sums "
        f"{format_seconds(found.reduce_s)}, optimizer {format_seconds(found.optimizer_s)}; "
        f"bubble {found.bubble:.1%}; MFU {_or_unknown(found.mfu, '.1%')}"
    )
    energy = None if found.energy_j is None else format_rate(found.energy_j, "J")
    cost = None if found.cost_micro is None else f"{found.cost_micro / 1e6:.6g}"
    yield f"  energy {energy or 'unknown'}, cost {cost or 'unknown'} a step"


def _stage_table(plan: TrainPlan, found: Prediction) -> Iterator[str]:
    """One row for each different stage."""
    head = ("stage", "on", "layers", "busy", "sends", "sums", "memory", "of")
    rows: list[tuple[str, ...]] = [head]
    seen: set[tuple[int, tuple[str, ...]]] = set()
    for stage in found.stages:
        planned = plan.pipelines[stage.pipeline].stages[stage.stage]
        row = (
            planned.group, str(planned.num_layers), format_seconds(stage.busy_s),
            format_seconds(stage.send_s), format_seconds(stage.reduce_s),
            format_bytes(stage.memory_bytes), format_bytes(stage.memory_limit_bytes),
        )  # fmt: skip
        if (stage.stage, row) not in seen:
            seen.add((stage.stage, row))
            rows.append((f"{stage.pipeline}.{stage.stage}", *row))
    yield from columns(rows)


def others_lines(found: Found, bounds: Bounds) -> Iterator[str]:
    """Say how far the plan is from the upper bounds, and what else was looked at."""
    ratio, strict = bounds.ratios(found.best.prediction.tokens_per_s)
    if bounds.tokens_per_s is not None:
        yield (
            f"upper bound: {bounds.tokens_per_s:,.0f} tokens/s, each group alone at its best and "
            f"added up: the plan reaches {_or_unknown(ratio, '.1%')}"
        )
    yield (
        f"compute alone: {bounds.compute_tokens_per_s:,.0f} tokens/s, without bubbles and links: "
        f"the plan reaches {strict:.1%}"
    )
    best = found.best.prediction.iteration_s
    for candidate in found.runners_up:
        slower = candidate.prediction.iteration_s / best - 1
        stages = " | ".join(dict.fromkeys(stages_text(p) for p in candidate.plan.pipelines))
        yield f"runner-up +{slower:.1%}: {candidate.plan.schedule}, {stages}"
    yield f"{found.num_looked_at} plans predicted ({found.how})"


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "plan": asdict(candidate.plan),
        "fingerprint": candidate.plan.fingerprint,
        "prediction": asdict(candidate.prediction),
        "origin": candidate.origin,
        "is_simulated": candidate.is_simulated,
    }


def found_json(found: Found, bounds: Bounds, why: Explanation | None) -> dict[str, Any]:
    ratio, strict = bounds.ratios(found.best.prediction.tokens_per_s)
    told = {
        "bounds": {
            "tokens_per_s": bounds.tokens_per_s,
            "compute_tokens_per_s": bounds.compute_tokens_per_s,
            "ratio": ratio,
            "strict_ratio": strict,
            "groups": [
                {"group": g.group, "num_devices": g.num_devices, "alone": g.alone,
                 "compute": g.compute, "times": g.times}
                for g in bounds.groups
            ],
        },
        "explanation": why.to_dict() if why else None,
    }  # fmt: skip
    return told | {
        "best": candidate_json(found.best),
        "runners_up": [candidate_json(candidate) for candidate in found.runners_up],
        "rejected": [
            {"plan": asdict(r.plan), "origin": r.origin, "reason": r.reason}
            for r in found.rejected
        ],
        "num_looked_at": found.num_looked_at,
        "is_exact": found.is_exact,
    }  # fmt: skip


def simulation_json(found: Simulation) -> dict[str, Any]:
    from mxn.train.plan.picture import plan_lanes

    return {
        "plan": asdict(found.plan),
        "prediction": asdict(found.prediction),
        "stages": [
            {
                "label": lane.label,
                "detail": lane.detail,
                "idle": lane.idle,
                "spans": [list(span) for span in lane.spans],
            }
            for lane in plan_lanes(found)
        ],
    }


# -- text --------------------------------------------------------------------------------------


def columns(rows: list[tuple[str, ...]], *, head: bool = True) -> Iterator[str]:
    """Return rows as aligned text, indented; numbers below a head stand to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if head and column > 1 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def _or_unknown(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)
