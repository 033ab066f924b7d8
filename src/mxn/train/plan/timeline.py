"""A simulated step as lanes of spans, and as text for a terminal. Start at `lanes_of`.

`timeline_svg.svg` draws the same lanes as a picture. Knows seconds and names; knows no plan: who
has one gives each stage its label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mxn.errors import ConfigError
from mxn.train.plan.events import Timeline
from mxn.units import format_seconds

SpanKind = Literal["F", "B", "W", "reduce", "optimizer"]

_LETTERS: dict[SpanKind, str] = {"F": "F", "B": "B", "W": "W", "reduce": "r", "optimizer": "o"}
_WORDS = {"F": "forward", "B": "backward", "W": "weights", "r": "gradient sum", "o": "optimizer"}
_IDLE = "·"


class Span(NamedTuple):
    """Something that a stage does. `text` is written into it where it fits, `note` explains it."""

    kind: SpanKind
    start_s: float
    end_s: float
    chunk: int = 0
    text: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One stage. `messages` are (start, end) of what it sends; `idle` is a share of the step."""

    label: str
    detail: str
    spans: Sequence[Span]
    messages: Sequence[tuple[float, float]]
    idle: float


def lanes_of(
    timeline: Timeline,
    labels: Sequence[tuple[str, str]] | None = None,
    *,
    after: Sequence[Sequence[Span]] | None = None,
    until_s: float | None = None,
) -> list[Lane]:
    """Return one lane per stage.

    `labels` are (label, detail) of each stage, `after` spans that follow its passes (gradient sums,
    optimizer), `until_s` the length of the step that idle shares are of; without it, its last span.

    Raises: ConfigError when `labels` or `after` are not one per stage.
    """
    num = timeline.num_stages
    labels = labels or [(f"stage {stage}", "") for stage in range(num)]
    after = after or [()] * num
    if len(labels) != num or len(after) != num:
        raise ConfigError(f"{len(labels)} labels, {len(after)} rows of spans for {num} stages")
    ends = [span.end_s for spans in after for span in spans]
    length = until_s or max([timeline.makespan_s, *ends])
    messages: list[list[tuple[float, float]]] = [[] for _ in range(num)]
    for transfer in timeline.transfers:
        messages[transfer.from_stage].append((transfer.start_s, transfer.end_s))
    lanes = []
    for stage, (label, detail) in enumerate(labels):
        spans = [*_passes(timeline, stage), *after[stage]]
        idle = max(0.0, 1 - sum(span.end_s - span.start_s for span in spans) / length)
        lanes.append(
            Lane(label=label, detail=detail, spans=spans, messages=messages[stage], idle=idle)
        )
    return lanes


def _passes(timeline: Timeline, stage: int) -> list[Span]:
    rows = (timeline.order[stage], timeline.starts_s[stage], timeline.ends_s[stage])
    return [
        Span(action.kind, start, end, action.chunk, str(action.micro_batch), str(action))
        for action, start, end in zip(*rows, strict=True)
    ]


def text(lanes: Sequence[Lane], *, columns: int = 100) -> str:
    """Return the lanes as one line of letters each, with a time axis and a legend.

    A column shows what its lane does for most of it; see `_letters`.
    Raises: ConfigError for no lanes, or columns that leave no room for a line of letters.
    """
    length = length_of(lanes)
    names = max(len(lane.label) for lane in lanes)
    room = columns - names - len(" || idle 100.0 %")
    if room < 10:
        raise ConfigError(
            f"{columns} columns leave {room} for the lanes", hint="a timeline needs ten at least"
        )
    lines = [
        f"{lane.label:<{names}} |{_letters(lane, length, room)}| idle {lane.idle * 100:5.1f} %"
        for lane in lanes
    ]
    end = format_seconds(length)
    lines.append(f"{'':<{names}}  0{end:>{room - 1}}")
    used = {_LETTERS[span.kind] for lane in lanes for span in lane.spans}
    words = [f"{letter} {word}" for letter, word in _WORDS.items() if letter in used]
    lines.append(f"{'':<{names}}  {', '.join([*words, f'{_IDLE} idle or waiting'])}")
    return "\n".join(lines)


def length_of(lanes: Sequence[Lane]) -> float:
    """Return the end of the last span. Raises: ConfigError when there is none."""
    length = max((span.end_s for lane in lanes for span in lane.spans), default=0.0)
    if length <= 0:
        raise ConfigError("there is nothing to draw: no lane has a span with a length")
    return length


def shares(lane: Lane, length_s: float, num_bins: int) -> list[dict[SpanKind, float]]:
    """Return for each of `num_bins` equal times the share of it that each kind of span fills."""
    bins: list[dict[SpanKind, float]] = [{} for _ in range(num_bins)]
    per_bin = length_s / num_bins
    for span in lane.spans:
        first = min(int(span.start_s / per_bin), num_bins - 1)
        last = min(int(span.end_s / per_bin), num_bins - 1)
        for number in range(first, last + 1):
            start = max(span.start_s, number * per_bin)
            part = min(span.end_s, (number + 1) * per_bin) - start
            if part > 0:
                here = bins[number]
                here[span.kind] = here.get(span.kind, 0.0) + part / per_bin
    return bins


def _letters(lane: Lane, length: float, columns: int) -> str:
    """Return one letter per column. What a column cannot show is owed to the next two.

    So also passes much shorter than a column have as many letters as they have time.
    """
    owed: dict[str, float] = {}
    seen: dict[str, int] = {}
    letters = []
    for number, here in enumerate(shares(lane, length, columns)):
        parts = {_LETTERS[kind]: share for kind, share in here.items()}
        parts[_IDLE] = 1 - sum(here.values())
        for letter, share in parts.items():
            if share > 1e-9:
                owed[letter] = owed.get(letter, 0.0) + share
                seen[letter] = number
        owed = {letter: share for letter, share in owed.items() if number - seen[letter] <= 2}
        letter = max(owed, key=lambda letter: owed[letter])
        owed[letter] -= 1
        letters.append(letter)
    return "".join(letters)
