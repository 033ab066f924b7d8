"""The guide names every route and every metric, and no other."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "api.md").read_text(encoding="utf-8")


def test_every_route_stands_in_the_guide(api):
    for route in api.app.routes:
        assert f"{route.path.replace(':path', '')}`" in GUIDE


def test_the_guide_has_exactly_the_metrics(api):
    text = api.get("/metrics").text
    real = set(re.findall(r"^# TYPE (mxn_\w+)", text, re.MULTILINE))
    real = {name for name in real if not name.endswith("_created")}
    assert set(re.findall(r"`(mxn_\w+)`", GUIDE)) == real


def test_every_error_code_stands_in_the_guide():
    source = Path(__file__).parents[2] / "src" / "mxn" / "serve"
    text = "".join(path.read_text(encoding="utf-8") for path in source.rglob("*.py"))
    codes = set(re.findall(r'code(?:=|, code = [^\n]*, )"(\w+)"', text))
    assert codes, "the pattern still finds codes"
    assert {code for code in codes if f"`{code}`" not in GUIDE} == set()
