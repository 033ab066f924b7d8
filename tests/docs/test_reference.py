"""Generated pages are what their script writes, and the pages link to things that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_generated_pages_are_up_to_date():
    done = subprocess.run(
        [sys.executable, "tools/make_docs.py", "--check"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nrun: python tools/make_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text)
    named = re.findall(r"`((?:src|tests|docs|bench|tools|recipes)/[\w./-]+)`", text)
    missing = [t for t in targets if not (page.parent / t).exists()]
    missing += [n for n in named if not (ROOT / n).exists() and "NAME" not in n]
    assert not missing, f"{page.relative_to(ROOT)} names files that do not exist: {missing}"
