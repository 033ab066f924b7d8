"""Run the parity tests of the native families and write docs/reference/parity.md.

python tools/parity_table.py            # about a minute; `MXN_TEST_DEVICE` chooses the device
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("prefill", "decode", "batch")
TESTS = "tests/parity/test_decoder_families.py"


def measure() -> dict[str, dict[str, float]]:
    """Return case -> what -> largest relative error. Raises: CalledProcessError on a red test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "errors.jsonl"
        subprocess.run(
            [sys.executable, "-m", "pytest", TESTS, "-q"],
            cwd=ROOT,
            env=os.environ | {"MXN_PARITY_REPORT": str(report)},
            check=True,
        )
        errors: dict[str, dict[str, float]] = defaultdict(dict)
        for line in report.read_text().splitlines():
            row = json.loads(line)
            known = errors[row["case"]].get(row["what"], 0.0)
            errors[row["case"]][row["what"]] = max(known, row["error"])
    return errors


def render(errors: dict[str, dict[str, float]]) -> str:
    from importlib.metadata import version

    lines = [
        "# Parity of the native families",
        "",
        "Written by `python tools/parity_table.py`. Largest error of the logits in float32, as a"
        " part",
        f"of the largest logit, against `transformers` {version('transformers')} on a small random",
        "checkpoint that it made; the bound in the tests is 1e-4. Greedy tokens are equal over 64",
        "steps in every row.",
        "",
        "| checkpoint | " + " | ".join(COLUMNS) + " | 64 greedy tokens |",
        "|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for case in sorted(errors):
        cells = [f"{errors[case][column]:.1e}" for column in COLUMNS]
        lines.append(f"| {case} | " + " | ".join(cells) + " | equal |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    path = ROOT / "docs" / "reference" / "parity.md"
    path.write_text(render(measure()))
    print(f"wrote {path.relative_to(ROOT)}")
