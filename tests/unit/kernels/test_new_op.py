"""The generator of ops writes files that parse, and refuses bad names."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "new_op.py"


def test_new_op_writes_four_files_that_parse(tmp_path: Path) -> None:
    write = runpy.run_path(str(TOOL))["write"]
    paths = write("sparkle", tmp_path)
    assert {path.name for path in paths} == {"__init__.py", "naive.py", "torch_.py", "cases.py"}
    for path in paths:
        ast.parse(path.read_text())
        assert "sparkle" in path.read_text()


@pytest.mark.parametrize("name", ["2d", "class", "RmsNorm", "a-b"])
def test_bad_name_is_refused(name: str, tmp_path: Path) -> None:
    write = runpy.run_path(str(TOOL))["write"]
    with pytest.raises(ValueError, match="an op is named"):
        write(name, tmp_path)


def test_taken_name_is_refused(tmp_path: Path) -> None:
    write = runpy.run_path(str(TOOL))["write"]
    write("sparkle", tmp_path)
    with pytest.raises(ValueError, match="exists"):
        write("sparkle", tmp_path)
