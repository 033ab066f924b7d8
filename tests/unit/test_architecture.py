"""The import floors hold, and names cost nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "triton", "numpy")


@pytest.mark.parametrize(
    "module",
    ["mxn", "mxn.cli.main", "mxn.engine.protocol", "mxn.engine.scheduler", "mxn.models.spec"],
)
def test_importing_a_name_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []


def test_imports_point_down():
    """The contracts stand in pyproject.toml; `make check` prints the chain that breaks one."""
    # A process of its own: import-linter switches off the loggers that exist when it starts.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_variable_that_is_read_stands_in_the_table():
    import re
    from pathlib import Path

    import mxn
    from mxn import env

    root = Path(mxn.__file__).parent
    named = {v.name for v in env.VARIABLES}
    used = set()
    for path in root.rglob("*.py"):
        used |= set(re.findall(r"""["'](MXN_[A-Z_]+)["']""", path.read_text()))
    assert used <= named, f"read but not in env.VARIABLES: {sorted(used - named)}"
