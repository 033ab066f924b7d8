"""A simulated step as an SVG picture. Start at `svg`.

One lane per stage: its passes with their micro-batches, below them the messages that it sends,
beside it how much of the step it stands idle. Colours follow the viewer's light or dark scheme.
Where passes are too narrow to see, lanes show which share of each moment they fill. Numbers to
text; no I/O.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple
from xml.sax.saxutils import escape

from mxn.errors import ConfigError
from mxn.train.plan.timeline import Lane, Span, SpanKind, length_of, shares
from mxn.units import format_seconds

_CLASSES: dict[SpanKind, tuple[str, str]] = {
    "F": ("f", "forward"),
    "B": ("b", "backward"),
    "W": ("w", "weight gradients"),
    "reduce": ("r", "gradient sum"),
    "optimizer": ("o", "optimizer"),
}
# Colours by name, not by variable: many programs that draw SVG know no CSS variables.
_STYLE = """
text { font-family: system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif;
       font-size: 12px; fill: #1f2430; }
.paper { fill: #ffffff; } .lane { fill: #f3f4f7; }
.grid { stroke: #e3e6eb; stroke-width: 1; }
.title { font-size: 16px; font-weight: 600; } .soft { fill: #6b7280; font-size: 11px; }
.num { fill: #ffffff; font-size: 10px; text-anchor: middle; pointer-events: none; }
.mid { text-anchor: middle; } .end { text-anchor: end; }
.f { fill: #3a6fb5; } .b { fill: #d06a2c; } .w { fill: #8d5fb0; }
.r { fill: #2e8b6d; } .o { fill: #a8891f; } .t { fill: #8a93a3; }
.k1 { fill-opacity: .8; } .k2 { fill-opacity: .64; } .k3 { fill-opacity: .5; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e8ec; } .soft { fill: #9aa3b2; } .num { fill: #ffffff; }
  .paper { fill: #14171d; } .lane { fill: #1c2028; } .grid { stroke: #2a2f39; }
}
"""
_IDLE_PX, _MARGIN_PX = 84, 16
_LEAST_LABEL_PX, _LABEL_DIGIT_PX = 90, 7.2
_MANY_LANES = 24  # from here on lanes are low and have no second line of words
_TOP_PX, _LINE_PX, _FOOT_PX = 46, 15, 62
_LETTER_PX = 6.3  # of a subtitle, on average
_NARROW_PX = 4.0  # passes narrower than this on average have no number and no note
_INVISIBLE_PX = 1.2  # narrower than this, lanes show shares
_BIN_PX = 4.0
_DIGIT_PX = 6.5
_AXIS_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


class _Sizes(NamedTuple):
    """Heights in pixels: of a lane, of its bar of passes, of its line of messages."""

    lane: int
    bar: int
    wire: int


_ROOMY, _LOW = _Sizes(36, 22, 4), _Sizes(20, 12, 2)


def svg(
    lanes: Sequence[Lane], *, title: str, subtitle: Sequence[str] = (), width: int = 1200
) -> str:
    """Return the picture as one SVG document of `width` pixels; `subtitle` is lines of words.

    Raises: ConfigError when no lane has a span with a length, or `width` leaves no room.
    """
    length = length_of(lanes)
    sizes = _LOW if len(lanes) >= _MANY_LANES else _ROOMY
    lines = [line for words in subtitle for line in _wrapped(words, width)]
    first = _TOP_PX + _LINE_PX * len(lines)
    bottom = first + sizes.lane * len(lanes)
    height = bottom + _FOOT_PX
    left = _MARGIN_PX + _label_px(lanes)
    room = width - left - _IDLE_PX - _MARGIN_PX
    if room < _LEAST_LABEL_PX:
        raise ConfigError(f"{width} pixels leave {room:.0f} for the lanes", hint="draw it wider")
    tops = [first + number * sizes.lane for number in range(len(lanes))]
    mean_px = _mean_span_s(lanes) * room / length
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        _text(_MARGIN_PX, 28, title, "title"),
        *(
            _text(_MARGIN_PX, 46 + number * _LINE_PX, line, "soft")
            for number, line in enumerate(lines)
        ),
        *(_rect(left, top + 3, room, sizes.bar, "lane") for top in tops),
        *_axis(length, left, room, first, bottom),
        *(
            _lane(lane, sizes, top, left, room / length, length, width, mean_px)
            for lane, top in zip(lanes, tops, strict=True)
        ),
        *_legend(lanes, left, bottom + 44),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _wrapped(words: str, width: int) -> list[str]:
    return textwrap.wrap(words, max(20, int((width - 2 * _MARGIN_PX) / _LETTER_PX)))


def _label_px(lanes: Sequence[Lane]) -> float:
    letters = max(max(len(lane.label), 0.92 * len(lane.detail)) for lane in lanes)
    return max(_LEAST_LABEL_PX, letters * _LABEL_DIGIT_PX + 8)


def _text(x: float, y: float, words: str, classes: str = "") -> str:
    return f'<text x="{_px(x)}" y="{_px(y)}" class="{classes}">{escape(words)}</text>'


def _px(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _rect(x: float, y: float, width: float, height: float, classes: str, note: str = "") -> str:
    size = f'x="{_px(x)}" y="{_px(y)}" width="{_px(width)}" height="{_px(height)}"'
    if not note:
        return f'<rect class="{classes}" {size}/>'
    return f'<rect class="{classes}" {size} rx="1.5"><title>{escape(note)}</title></rect>'


def _mean_span_s(lanes: Sequence[Lane]) -> float:
    spans = [span.end_s - span.start_s for lane in lanes for span in lane.spans]
    return sum(spans) / len(spans)


def _lane(
    lane: Lane,
    sizes: _Sizes,
    top: float,
    left: float,
    px_per_s: float,
    length: float,
    width: int,
    mean_px: float,
) -> str:
    """Return one lane: names, passes, messages, idle share."""
    middle = top + 3 + sizes.bar / 2 + 4
    has_detail = bool(lane.detail) and sizes is _ROOMY
    parts = [
        _text(_MARGIN_PX, top + 13 if has_detail else middle, lane.label),
        _text(width - _MARGIN_PX, middle, f"idle {lane.idle * 100:.1f} %", "end"),
    ]
    if has_detail:
        parts.append(_text(_MARGIN_PX, top + 26, lane.detail, "soft"))
    if mean_px < _INVISIBLE_PX:
        parts += _as_shares(lane, top + 3, sizes.bar, left, px_per_s, length)
    elif mean_px < _NARROW_PX:
        parts += _as_bars(lane, top + 3, sizes.bar, left, px_per_s)
    else:
        numbered = _numbered(lane, px_per_s)
        parts += [
            _span(span, top + 3, sizes.bar, left, px_per_s, span.kind in numbered)
            for span in lane.spans
        ]
    parts.append(_wires(lane, top + 4 + sizes.bar + sizes.wire / 4, sizes.wire, left, px_per_s))
    return "\n".join(part for part in parts if part)


def _numbered(lane: Lane, px_per_s: float) -> set[SpanKind]:
    """Return the kinds of passes of which each has room for its number: all of them or none."""
    tight = {
        span.kind
        for span in lane.spans
        if (span.end_s - span.start_s) * px_per_s < _DIGIT_PX * len(span.text) + 3
    }
    return set(_CLASSES) - tight


def _span(
    span: Span, top: float, tall: int, left: float, px_per_s: float, is_numbered: bool
) -> str:
    x, wide = left + span.start_s * px_per_s, (span.end_s - span.start_s) * px_per_s
    classes = _CLASSES[span.kind][0] + (f" k{min(span.chunk, 3)}" if span.chunk else "")
    note = (
        f"{span.note or span.kind}: {format_seconds(span.start_s)} to {format_seconds(span.end_s)}"
    )
    gap = 0.6 if wide > 3 else 0.0  # a hair between two passes, so that they can be counted
    drawn = _rect(x, top, wide - gap, tall, classes, note)
    if span.text and is_numbered:
        drawn += _text(x + (wide - gap) / 2, top + tall / 2 + 4, span.text, "num")
    return drawn


def _as_bars(lane: Lane, top: float, tall: int, left: float, px_per_s: float) -> list[str]:
    """Return one path for each kind of pass."""
    paths: dict[SpanKind, list[str]] = {}
    for span in lane.spans:
        wide = _px((span.end_s - span.start_s) * px_per_s)
        shape = f"M{_px(left + span.start_s * px_per_s)} {_px(top)}h{wide}v{tall}h-{wide}z"
        paths.setdefault(span.kind, []).append(shape)
    return [f'<path class="{_CLASSES[kind][0]}" d="{"".join(d)}"/>' for kind, d in paths.items()]


def _as_shares(
    lane: Lane, top: float, tall: int, left: float, px_per_s: float, length: float
) -> list[str]:
    """Return stacked columns: the height of a colour is the share of that moment it fills."""
    num_bins = max(1, round(length * px_per_s / _BIN_PX))
    step = length * px_per_s / num_bins
    columns = []
    for here in shares(lane, length, num_bins):
        columns.append(tuple((kind, round(here.get(kind, 0.0) * tall, 1)) for kind in _CLASSES))
    paths: dict[SpanKind, list[str]] = {}
    number = 0
    for column, same in groupby(columns):
        count = len(list(same))
        base = top + tall
        for kind, height in column:
            if height > 0:
                base -= height
                x = _px(left + number * step)
                shape = f"M{x} {_px(base)}h{_px(count * step)}v{_px(height)}h-{_px(count * step)}z"
                paths.setdefault(kind, []).append(shape)
        number += count
    return [f'<path class="{_CLASSES[kind][0]}" d="{"".join(d)}"/>' for kind, d in paths.items()]


def _wires(lane: Lane, top: float, tall: int, left: float, px_per_s: float) -> str:
    """Return the messages as one path; those that touch within a pixel are one piece."""
    pieces: list[list[float]] = []
    for start, end in sorted(lane.messages):
        if pieces and (start - pieces[-1][1]) * px_per_s < 0.7:
            pieces[-1][1] = max(pieces[-1][1], end)
        else:
            pieces.append([start, end])
    if not pieces:
        return ""
    shapes = []
    for start, end in pieces:
        wide = _px(max((end - start) * px_per_s, 0.5))
        shapes.append(f"M{_px(left + start * px_per_s)} {_px(top)}h{wide}v{tall}h-{wide}z")
    return f'<path class="t" d="{"".join(shapes)}"/>'


def _axis(length: float, left: float, room: float, top: float, bottom: float) -> list[str]:
    """Return grid lines and their times, at steps of 1, 2 or 5 times a power of ten."""
    rough = length / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    unit_s, unit = next((s, unit) for s, unit in _AXIS_UNITS if length >= s or unit == "us")
    parts = []
    for number in range(int(length / step + 1e-9) + 1):
        x = _px(left + number * step / length * room)
        ends = f'y1="{_px(top - 4)}" y2="{_px(bottom)}"'
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" {ends}/>')
        words = f"{number * step / unit_s:.6g} {unit}"
        parts.append(_text(left + number * step / length * room, bottom + 15, words, "soft mid"))
    return parts


def _legend(lanes: Sequence[Lane], left: float, y: float) -> list[str]:
    used = {span.kind for lane in lanes for span in lane.spans}
    entries = [entry for kind, entry in _CLASSES.items() if kind in used]
    if any(span.chunk for lane in lanes for span in lane.spans):
        entries.insert(1, ("f k1", "of a later chunk: lighter"))
    if any(lane.messages for lane in lanes):
        entries.append(("t", "message to another stage"))
    parts, x = [], left
    for classes, words in entries:
        parts += [_rect(x, y - 9, 11, 11, classes), _text(x + 16, y, words, "soft")]
        x += 16 + 6.3 * len(words) + 20
    return parts
