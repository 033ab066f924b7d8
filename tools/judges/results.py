"""Outcomes of one suite, and how they compare with the failures that are known and explained.

Reads JUnit XML and known/<judge>.toml. Knows no suite. Start at `read_junit` and `compare`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

Outcome = Literal["passed", "failed", "skipped"]

KINDS = {
    "bug": "mxn is wrong and will be changed",
    "missing": "mxn does not offer this (yet)",
    "decision": "mxn answers otherwise on purpose",
    "model": "the small models that ship with mxn cannot do it",
    "suite": "the test is about the suite's own server, model or mock",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One test case; `name` is file::test[parameters].

    Without the class: in these suites it only tells the synchronous client from the other.
    """

    name: str
    outcome: Outcome
    message: str = ""

    @property
    def test(self) -> str:
        """The name without parameters."""
        return self.name.partition("[")[0].removesuffix(" (async)")


@dataclass(frozen=True, slots=True)
class Known:
    """Tests that are expected to fail, and why. A name without parameters means all of them."""

    kind: str
    reason: str
    tests: tuple[str, ...]

    def covers(self, case: Case) -> bool:
        return case.name in self.tests or case.test in self.tests


@dataclass(slots=True)
class Comparison:
    cases: list[Case]
    explained: list[tuple[Known, list[Case]]] = field(default_factory=list)
    unexplained: list[Case] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)  # known to fail, and all of it passes

    def count(self, outcome: Outcome) -> int:
        return sum(case.outcome == outcome for case in self.cases)


def read_junit(path: Path) -> list[Case]:
    """Return the cases of a JUnit file. Raises: FileNotFoundError when the suite wrote none."""
    cases: dict[str, Case] = {}
    for element in ElementTree.parse(path).iter("testcase"):
        case = _case(element)
        known = cases.get(case.name)
        if known is None or known.outcome == "passed":  # an error at the end counts as a failure
            cases[case.name] = case
    return list(cases.values())


def _case(element: ElementTree.Element) -> Case:
    module, name = element.get("classname", ""), element.get("name", "")
    full = "::".join([*_short(module), name])
    if "TestAsync" in module:
        full += " (async)"
    for tag in ("failure", "error"):
        found = element.find(tag)
        if found is not None:
            return Case(full, "failed", (found.get("message") or found.text or "").strip())
    skipped = element.find("skipped")
    if skipped is not None:
        return Case(full, "skipped", (skipped.get("message") or "").strip())
    return Case(full, "passed")


def _short(module: str) -> list[str]:
    """`tests.api_resources.chat.test_completions.TestX` -> [`chat/test_completions`]."""
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.startswith("test_")), None)
    if at is None:
        return [module] if module else []
    folders = [part for part in parts[:at] if part not in ("tests", "api_resources", "unit")]
    return ["/".join([*folders, parts[at]])]


def read_known(path: Path) -> list[Known]:
    """Return the groups of a known/*.toml; none when there is no such file.

    Raises: ValueError for an unknown kind, an empty reason, or a test that is named twice.
    """
    if not path.is_file():
        return []
    groups = tomllib.loads(path.read_text(encoding="utf-8")).get("known", [])
    seen: set[str] = set()
    for group in groups:
        if group["kind"] not in KINDS or not group["reason"]:
            raise ValueError(f"{path}: kind {group['kind']!r} must be one of {list(KINDS)}")
        twice = [test for test in group["tests"] if test in seen]
        if twice:
            raise ValueError(f"{path}: named twice: {twice}")
        seen.update(group["tests"])
    return [Known(g["kind"], g["reason"], tuple(g["tests"])) for g in groups]


def compare(cases: Iterable[Case], known: list[Known]) -> Comparison:
    """Sort failures into explained and unexplained; report names that no longer fail."""
    result = Comparison(list(cases))
    failed = [case for case in result.cases if case.outcome == "failed"]
    for group in known:
        covered = [case for case in failed if group.covers(case)]
        if covered:
            result.explained.append((group, covered))
    explained = {case.name for _, covered in result.explained for case in covered}
    result.unexplained = [case for case in failed if case.name not in explained]
    failing = {name for case in failed for name in (case.name, case.test)}
    present = {name for case in result.cases for name in (case.name, case.test)}
    result.stale = [t for g in known for t in g.tests if t in present and t not in failing]
    return result
