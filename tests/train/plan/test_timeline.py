"""Pictures of a step: valid XML, everything in its place, readable text."""

import re
from xml.etree import ElementTree

import pytest

from mxn.errors import ConfigError
from mxn.train.plan.events import simulate
from mxn.train.plan.schedules import order
from mxn.train.plan.timeline import Span, lanes_of, shares, text
from mxn.train.plan.timeline_svg import svg
from mxn.train.plan.times import Hop, PipelineTimes

_SVG = "{http://www.w3.org/2000/svg}"


def _line(schedule="1f1b", stages=3, chunks=1, batches=5, hop=Hop(0.25)):
    times = PipelineTimes.even(stages, forward_s=1.0, backward_s=2.0, num_chunks=chunks, hop=hop)
    return simulate(order(schedule, stages, chunks, batches), times)


def _picture(lanes, **kwargs):
    return ElementTree.fromstring(svg(lanes, **{"title": "a step"} | kwargs))


def _class(root, name):
    return [at for at in root.iter() if name in (at.get("class") or "").split()]


def test_the_picture_has_each_pass_of_each_stage():
    root = _picture(lanes_of(_line("zero-bubble")))
    for name in "fbw":
        # One more in the legend.
        assert len(_class(root, name)) == 3 * 5 + 1
    numbers = [at.text for at in _class(root, "num")]
    assert numbers.count("4") == 3 * 3


def test_passes_lie_in_the_picture_where_they_lie_in_time():
    line = _line()
    root = _picture(lanes_of(line), width=1000)
    lane = _class(root, "lane")[0]
    left, room = float(lane.get("x")), float(lane.get("width"))
    for stage in range(3):
        rects = [at for at in _class(root, "f") if at.find(f"{_SVG}title") is not None]
        row = rects[stage * 5 : stage * 5 + 5]
        starts = [
            s for a, s in zip(line.order[stage], line.starts_s[stage], strict=True) if a.kind == "F"
        ]
        want = [left + start / line.makespan_s * room for start in starts]
        assert [float(at.get("x")) for at in row] == pytest.approx(want, abs=0.01)


def test_nothing_is_drawn_outside_the_picture():
    for line in (_line(), _line("interleaved", 4, 2, 9), _line("1f1b", 8, 1, 400)):
        root = _picture(lanes_of(line), width=900)
        high = float(root.get("height"))
        for rect in root.iter(f"{_SVG}rect"):
            assert float(rect.get("x", 0)) + float(rect.get("width")) <= 900.01
            assert float(rect.get("y", 0)) + float(rect.get("height")) <= high + 0.01


def test_words_with_marks_of_xml_stay_words():
    lanes = lanes_of(_line(), [("a<b>", "x & y")] * 3)
    root = _picture(lanes, title='1 < 2 & "so"')
    words = [at.text for at in root.iter(f"{_SVG}text")]
    assert "a<b>" in words
    assert "x & y" in words
    assert '1 < 2 & "so"' in words


def test_numbers_are_shown_of_all_passes_of_a_kind_or_of_none():
    # Here the two figures of the last micro-batches have no room in a forward.
    root = _picture(lanes_of(_line(batches=12, hop=Hop())), width=800)
    numbers = [at.text for at in _class(root, "num")]
    assert numbers.count("11") == numbers.count("3") == 3


def test_long_subtitles_are_wrapped_and_make_room():
    lanes = lanes_of(_line())
    short, long = (_picture(lanes, subtitle=["some words " * n], width=800) for n in (1, 40))
    lines = [at for at in _class(long, "soft") if (at.text or "").startswith("some words")]
    assert len(lines) == 4
    assert all(len(at.text) * 6.3 < 800 for at in lines)
    assert float(long.get("height")) - float(short.get("height")) == 3 * 15


def test_the_axis_says_times_with_units_up_to_the_end():
    root = _picture(lanes_of(_line()))
    ticks = [at.text for at in _class(root, "mid")]
    assert ticks[0] == "0 s"
    assert all(re.fullmatch(r"[\d.]+ s", tick) for tick in ticks)
    assert 4 <= len(ticks) <= 12


def test_many_narrow_passes_become_shares_and_the_file_stays_small():
    small = svg(lanes_of(_line("1f1b", 64, 1, 512)), title="large")
    ElementTree.fromstring(small)
    assert len(small) < 2_000_000
    assert 'class="num"' not in small


def test_letters_of_passes_shorter_than_a_column_are_as_many_as_their_time():
    line = _line("1f1b", 2, 1, 300, Hop(1.0))
    drawn = text(lanes_of(line), columns=100).splitlines()[0].split("|")[1]
    for letter, seconds in (("F", 300.0), ("B", 600.0)):
        want = seconds / line.makespan_s * len(drawn)
        assert drawn.count(letter) == pytest.approx(want, abs=2)


@pytest.mark.parametrize("batches", [20, 150])
def test_passes_without_numbers_are_drawn_at_their_times_too(batches):
    root = _picture(lanes_of(_line("1f1b", 3, 1, batches)), width=900)
    passes = sum(
        (at.get("d") or "").count("M") if at.tag.endswith("path") else at[0:] != []
        for name in "fb"
        for at in _class(root, name)
    )
    assert passes == 3 * batches * 2


def test_shares_add_up_to_the_busy_time():
    line = _line()
    for lane, busy in zip(lanes_of(line), line.busy_s, strict=True):
        bins = shares(lane, line.makespan_s, 37)
        total = sum(sum(here.values()) for here in bins) * line.makespan_s / 37
        assert total == pytest.approx(busy)
        assert all(sum(here.values()) <= 1 + 1e-9 for here in bins)


def test_idle_share_is_of_the_whole_step():
    line = _line()
    after = [[Span("optimizer", line.makespan_s, line.makespan_s + 1.0)]] * 3
    lanes = lanes_of(line, after=after)
    assert lanes[0].idle == pytest.approx(1 - (15 + 1) / (line.makespan_s + 1))


def test_text_has_a_line_per_stage_of_the_asked_width():
    lines = text(lanes_of(_line(hop=Hop())), columns=60).splitlines()
    assert len(lines) == 5
    assert {len(line) for line in lines[:3]} == {60}
    assert lines[0].startswith("stage 0 |FF")
    assert "F forward, B backward" in lines[-1]
    assert "21 s" in lines[-2]


def test_a_width_without_room_and_a_step_without_length_are_refused():
    with pytest.raises(ConfigError, match="20 columns leave"):
        text(lanes_of(_line()), columns=20)
    with pytest.raises(ConfigError, match="nothing to draw"):
        svg([], title="none")
    with pytest.raises(ConfigError, match="2 labels"):
        lanes_of(_line(), [("a", ""), ("b", "")])
