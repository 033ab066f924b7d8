"""Writes docs/reference/judges.md: one section per suite, each replaced when its suite was run."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from results import KINDS, Case, Comparison, Known

_HEAD = """# Outside judges

Written by `python tools/judges/run.py`; how to run it stands in `tools/judges/README.md`. Other
projects' test suites, unedited, against a real mxn server with the small models that ship with it.
A failure that is not explained in `tools/judges/known/` fails the run.

Kinds of explained failures: {kinds}.
"""
_MARK = re.compile(r"<!-- judge (\w+) -->\n(.*?)(?=<!-- judge |\Z)", re.DOTALL)


def update(path: Path, judge: str, title: str, source: str, result: Comparison) -> None:
    """Replace the section of one judge; the others stay."""
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    sections = {name: text.rstrip() for name, text in _MARK.findall(old)}
    sections[judge] = _section(title, source, result)
    kinds = "; ".join(f"**{kind}**: {meaning}" for kind, meaning in KINDS.items())
    blocks = [_HEAD.format(kinds=kinds)]
    blocks += [f"<!-- judge {name} -->\n{text}\n" for name, text in sorted(sections.items())]
    path.write_text("\n".join(blocks), encoding="utf-8")


def _section(title: str, source: str, result: Comparison) -> str:
    lines = [
        f"## {title}",
        "",
        f"{source}.",
        "",
        "| passed | failed, explained | failed, unexplained | skipped |",
        "|---|---|---|---|",
        f"| {result.count('passed')} | {sum(len(c) for _, c in result.explained)}"
        f" | {len(result.unexplained)} | {result.count('skipped')} |",
    ]
    if result.explained:
        lines += ["", "| kind | failures | why | tests |", "|---|---|---|---|"]
        lines += [_row(known, cases) for known, cases in _by_kind(result.explained)]
    if result.unexplained:
        lines += ["", "Unexplained:", ""]
        lines += [f"- `{case.name}`: {first_line(case.message)}" for case in result.unexplained]
    return "\n".join(lines)


def _by_kind(explained: list[tuple[Known, list[Case]]]) -> list[tuple[Known, list[Case]]]:
    return sorted(explained, key=lambda item: list(KINDS).index(item[0].kind))


def _row(known: Known, cases: list[Case]) -> str:
    counts = Counter(case.test for case in cases)
    tests = ", ".join(f"`{test}`" + (f" ×{n}" if n > 1 else "") for test, n in counts.items())
    return f"| {known.kind} | {len(cases)} | {known.reason} | {tests} |"


def first_line(text: str) -> str:
    """Return the beginning of a failure for a table or a terminal."""
    line = next(iter(text.strip().splitlines()), "")
    return line[:160].replace("|", "\\|").replace("`", "'")
