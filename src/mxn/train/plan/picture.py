"""A simulated plan as a picture and as text, with its names and numbers. Start at `plan_svg`.

Numbers in, text out; no I/O. `timeline` and `timeline_svg` draw; this knows the plan.
"""

from __future__ import annotations

from mxn.train.plan.simulate import Simulation
from mxn.train.plan.timeline import Lane, Span, lanes_of, text
from mxn.train.plan.timeline_svg import svg
from mxn.units import format_seconds

MAX_KINDS = 8
"""Kinds of pipelines that are drawn; a picture of more is a wall."""


def plan_svg(simulation: Simulation, *, width: int = 1200, max_kinds: int = MAX_KINDS) -> str:
    """Return the timeline of a step as one SVG document: a lane for each stage.

    Pipelines that are alike are drawn once, and of more than `max_kinds` kinds the first ones.
    """
    lanes = plan_lanes(simulation, max_kinds=max_kinds)
    lines = [devices(simulation), numbers(simulation, max_kinds)]
    return svg(lanes, title=title(simulation), subtitle=lines, width=width)


def plan_text(simulation: Simulation, *, columns: int = 100, max_kinds: int = MAX_KINDS) -> str:
    """Return the timeline of a step for a terminal of so many columns."""
    drawn = text(plan_lanes(simulation, max_kinds=max_kinds), columns=columns)
    head = [title(simulation), devices(simulation), numbers(simulation, max_kinds)]
    return "\n".join([*head, "", drawn])


def title(simulation: Simulation) -> str:
    """Return what runs: model, schedule, micro-batches, pipelines."""
    plan = simulation.plan
    count = len(plan.pipelines)
    pipelines = "1 pipeline" if count == 1 else f"{count} pipelines"
    return f"{plan.model}: {plan.schedule}, {plan.micro_batches} micro-batches, {pipelines}"


def devices(simulation: Simulation) -> str:
    """Return on how many devices of which chips it runs."""
    plan = simulation.plan
    counts: dict[str, int] = {}
    for pipeline in plan.pipelines:
        for stage in pipeline.stages:
            chip = simulation.chips[stage.group]
            counts[chip] = counts.get(chip, 0) + stage.tp
    where = " + ".join(f"{count} {chip}" for chip, count in counts.items())
    return f"{plan.num_devices} devices: {where}" if len(counts) > 1 else where


def numbers(simulation: Simulation, max_kinds: int = MAX_KINDS) -> str:
    """Return the step's figures in one line, and what of it is not drawn."""
    made = simulation.prediction
    parts = [
        f"{format_seconds(made.iteration_s)} a step",
        f"{made.tokens_per_s:,.0f} tokens/s",
        f"bubble {made.bubble * 100:.1f} %",
        f"gradient sums {format_seconds(made.reduce_s)} not hidden",
        f"optimizer {format_seconds(made.optimizer_s)}",
    ]
    if made.mfu is not None:
        parts.append(f"MFU {made.mfu * 100:.1f} %")
    kinds = len(simulation.timelines)
    if kinds > max_kinds:
        parts.append(f"{max_kinds} of {kinds} kinds of pipelines drawn")
    origin = "" if made.basis == "simulated" else f" from {made.basis} figures"
    return " · ".join([*parts, f"simulated{origin}"])


def plan_lanes(simulation: Simulation, *, max_kinds: int = MAX_KINDS) -> list[Lane]:
    """Return the stages of the first pipeline of each kind, with gradient sums and optimizer."""
    made = simulation.prediction
    summed_s = made.pipeline_s + made.reduce_s
    lanes: list[Lane] = []
    for kind in range(min(len(simulation.timelines), max_kinds)):
        number = simulation.kinds.index(kind)
        stages = range(len(simulation.plan.pipelines[number].stages))
        after = [
            [
                *(Span("reduce", *span) for span in simulation.sums.get((number, stage), ())),
                Span("optimizer", summed_s, summed_s + made.optimizer_s),
            ]
            for stage in stages
        ]
        lanes += lanes_of(
            simulation.timelines[kind],
            [_label(simulation, number, stage) for stage in stages],
            after=after,
            until_s=made.iteration_s,
        )
    return lanes


def _label(simulation: Simulation, pipeline: int, number: int) -> tuple[str, str]:
    """Return two lines of words: which stage on which chip; its layers, and how many are alike."""
    stage = simulation.plan.pipelines[pipeline].stages[number]
    several = len(simulation.plan.pipelines) > 1
    name = f"{pipeline}.{number}" if several else f"{number}"
    times = f" x {stage.tp}" if stage.tp > 1 else ""
    layers = ", ".join(f"{chunk.first}-{chunk.end - 1}" for chunk in stage.chunks)
    alike = simulation.kinds.count(simulation.kinds[pipeline])
    copies = f", {alike} alike" if alike > 1 else ""
    return f"{name} {simulation.chips[stage.group]}{times}", f"layers {layers}{copies}"
