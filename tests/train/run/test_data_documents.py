"""Documents from files: every shape, and every way a line can be broken."""

from __future__ import annotations

import json

import pytest

from mxn.errors import ConfigError, NotFoundError
from mxn.train.run.data.documents import (
    BadLineError,
    Chat,
    Completion,
    Place,
    Skipped,
    Text,
    find_files,
    parse_line,
    read_documents,
)

PLACE = Place("a.jsonl", 7)


def parse(data: object):
    return parse_line(json.dumps(data).encode(), PLACE)


def test_each_shape_of_a_line_is_known():
    assert parse({"text": "hi"}) == Text("hi", PLACE)
    assert parse({"prompt": "a", "completion": "b", "id": 3}) == Completion("a", "b", PLACE)
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert parse({"messages": [user, assistant]}) == Chat((user, assistant), None, PLACE)
    tools = [{"type": "function"}]
    got = parse({"prompt": [user], "completion": [assistant], "tools": tools})
    assert got == Chat((user, assistant), tuple(tools), PLACE, first_target=1)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "is not JSON"),
        (b"\xff{}", "is not UTF-8"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "number that is too long"),
        (b"[1]", "is a JSON list"),
        (b"{}", "has neither"),
        (b'{"text": ""}', "empty or odd text"),
        (b'{"text": 3}', "empty or odd text"),
        (b'{"prompt": "a", "completion": ""}', "odd prompt or completion"),
        (b'{"prompt": ["a"], "completion": "b"}', "odd prompt or completion"),
        (b'{"text": "a\\ud800b"}', "half of a character"),
        (b'{"messages": []}', "no messages"),
        (b'{"messages": {"role": "user"}}', "no messages"),
        (b'{"messages": ["a"]}', "without a role"),
        (b'{"messages": [{"role": "user"}]}', "without content"),
        (b'{"messages": [{"role": "user", "content": 4}]}', "odd content"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no turn of the assistant"),
        (
            b'{"messages": [{"role": "assistant", "content": "a"}], "tools": "b"}',
            "odd tools",
        ),
    ],
)
def test_a_broken_line_says_how(raw, reason):
    with pytest.raises(BadLineError, match=reason):
        parse_line(raw, PLACE)


def test_a_whole_character_spelled_in_halves_is_one():
    assert parse_line(b'{"text": "\\ud83d\\ude00"}', PLACE) == Text("\U0001f600", PLACE)


def test_broken_lines_are_counted_and_the_first_are_named(tmp_path):
    lines = ['{"text": "one"}', "{oops", "", '{"text": "two"}', *['{"text": 1}'] * 8]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    skipped = Skipped()
    texts = [d.text for d in read_documents([tmp_path / "d.jsonl"], "file", skipped)]
    assert texts == ["one", "two"]
    assert skipped.count == 9
    assert skipped.reasons == {"is not JSON": 1, "has an empty or odd text": 8}
    assert [place for place, _ in skipped.examples] == [f"d.jsonl:{n}" for n in (2, 5, 6, 7, 8)]
    assert skipped.describe().startswith("9 lines skipped (d.jsonl:2 is not JSON; d.jsonl:5 has")
    assert skipped.describe().endswith("; …)")


def test_plain_text_is_one_document_or_many(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\r\ntwo\n\n\nthree \n \nfour")
    texts = {
        split: [d.text for d in read_documents([file], split, Skipped())]
        for split in ("file", "paragraph", "line")
    }
    assert texts["line"] == ["one", "two", "three ", "four"]
    assert texts["paragraph"] == ["one\r\ntwo", "three ", "four"]
    assert texts["file"] == ["one\ntwo\n\n\nthree \n \nfour"]
    places = [str(d.place) for d in read_documents([file], "paragraph", Skipped())]
    assert places == ["a.txt:1", "a.txt:5", "a.txt:7"]


def test_text_that_is_not_utf8_is_counted(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"good\n\xff\xfe\nalso good\n")
    skipped = Skipped()
    assert [d.text for d in read_documents([file], "line", skipped)] == ["good", "also good"]
    assert [*read_documents([file], "file", skipped)] == []
    assert skipped.examples == [("a.txt:2", "is not UTF-8"), ("a.txt:1", "is not UTF-8")]


def test_files_are_found_in_order_and_others_are_refused(tmp_path):
    for name in ("b.jsonl", "a.txt", "c.bin"):
        (tmp_path / name).write_text("x")
    assert [f.name for f in find_files([tmp_path])] == ["a.txt", "b.jsonl"]
    with pytest.raises(ConfigError, match=r"c\.bin is no data file"):
        find_files([tmp_path / "c.bin"])
    with pytest.raises(NotFoundError, match="no data file"):
        find_files([tmp_path / "missing.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="has no data file"):
        find_files([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="no data file is named"):
        find_files([])
    with pytest.raises(ConfigError, match="none of file"):
        list(read_documents([], "word", Skipped()))
