"""Runs the parity gate of a job: a process for each chip, in turn, and one verdict.

The float32 of the CPU is the truth, so a CPU group in float32 has nothing to be compared with.
A process checks one chip: `python -m mxn.train.run.gate.process REQUEST.json`. Start at `Gate`.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxn.errors import MxnError
from mxn.train.plan.plan import TrainPlan
from mxn.train.run import child, scratch
from mxn.train.run.job import DeviceSettings, Job
from mxn.train.run.supervise.needs import GateError

if TYPE_CHECKING:
    from mxn.train.run.gate.check import Finding

log = logging.getLogger("mxn.train")

_LONGEST_S = 1800.0
_SHOWN = 3
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was compared on one chip."""

    device: str
    chip: str
    dtype: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def problems(self) -> list[Finding]:
        """What is out of its budget; operators first, as they explain the layers."""
        bad = [finding for finding in self.findings if finding.problem is not None]
        return sorted(bad, key=lambda finding: not finding.operator)

    def summary(self) -> str:
        operators = {finding.operator for finding in self.findings if finding.operator}
        shares = [f.error / f.budget for f in self.findings if f.budget]
        return (
            f"parity of {self.device} ({self.chip}, {self.dtype}): {len(operators)} operators, "
            f"{len(self.findings)} tensors, at most {100 * max(shares, default=0):.0f} % of the "
            f"budget, {self.seconds:.1f} s"
        )


class Gate:
    """Checks each chip of a job once, whatever is planned again later."""

    def __init__(self, *, on_say: Say = log.info) -> None:
        self._on_say = on_say
        self._passed: set[tuple[str, str]] = set()

    def __call__(self, job: Job, plan: TrainPlan) -> None:
        """Raises: GateError naming operator, chip, error and budget."""
        used = {stage.group for pipeline in plan.pipelines for stage in pipeline.stages}
        groups = [group for group in job.devices if group.name in used]
        if not job.gate.parity or not is_mixed(job, groups):
            return
        for group in groups:
            key = _chip_key(job, group)
            if key == ("cpu", "float32") or key in self._passed:
                continue
            verdict = check_group(job, group)
            _refuse(verdict, group)
            self._on_say(verdict.summary())
            self._passed.add(key)


def is_mixed(job: Job, groups: Sequence[DeviceSettings]) -> bool:
    """Return whether groups compute on different chips, or in different dtypes."""
    return len({_chip_key(job, group) for group in groups}) > 1


def _chip_key(job: Job, group: DeviceSettings) -> tuple[str, str]:
    """Processes of one processor are alike; an accelerator of another group may be another chip."""
    kind, _, number = group.device.partition(":")
    return (kind if kind == "cpu" else f"{kind}:{number or 0}", job.dtype_of(group.name))


def _refuse(verdict: Verdict, group: DeviceSettings) -> None:
    problems = verdict.problems
    if not problems:
        return
    shown = "\n  ".join(str(problem) for problem in problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise GateError(
        f"{verdict.device} ({verdict.chip}, {verdict.dtype}) does not compute what the CPU does:\n"
        f"  {shown}{more}",
        hint=f"leave group {group.name!r} out or give it another dtype; "
        "gate: {parity: false} trains all the same",
    )


def check_group(job: Job, group: DeviceSettings, *, timeout_s: float = _LONGEST_S) -> Verdict:
    """Return what a process of its own found out about the chip of a group.

    Raises: GateError, with the end of its output, when the process fails.
    """
    with scratch.Folder("gate") as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        told = {"job": job.to_json(), "group": group.name, "answer": str(answer)}
        request.write_text(json.dumps(told), encoding="utf-8")
        command = child.command("mxn.train.run.gate.process", str(request))
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout_s, check=False,
                start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise GateError(
                f"the parity gate of group {group.name!r} took more than {timeout_s:g} s"
            ) from None
        if done.returncode or not answer.is_file():
            said = "\n".join(done.stderr.strip().splitlines()[-6:])
            raise GateError(
                f"the parity gate of group {group.name!r} ended with {done.returncode}:\n{said}"
            )
        return _verdict(json.loads(answer.read_text(encoding="utf-8")))


def _verdict(told: dict[str, Any]) -> Verdict:
    from mxn.train.run.gate.check import Finding

    findings = tuple(Finding(**finding) for finding in told["findings"])
    values: dict[str, Any] = told | {"findings": findings}
    return Verdict(**values)


def check_here(job: Job, group: DeviceSettings) -> Verdict:
    """Check the chip of a group in this process, on the job's first micro-batch."""
    import torch

    from mxn.chips import find_device
    from mxn.train.run.from_job import open_rows, open_source
    from mxn.train.run.gate.check import check_layers
    from mxn.train.run.gate.optimizer import check_optimizer

    began = time.perf_counter()
    device = find_device(group.device)
    dtype = job.dtype_of(group.name)
    target, computes_in = torch.device(device.torch_device), getattr(torch, dtype)
    source = open_source(job)
    batch = open_rows(job, source).micro_batch(0)
    findings = check_layers(source, batch, target, computes_in)
    findings += check_optimizer(source, target, computes_in)
    return Verdict(
        device=device.id,
        chip=device.chip,
        dtype=dtype,
        findings=tuple(findings),
        seconds=time.perf_counter() - began,
    )


def main(path: str) -> int:
    told = json.loads(Path(path).read_text(encoding="utf-8"))
    job = Job.from_json(told["job"])
    try:
        verdict = check_here(job, job.group(told["group"]))
    except MxnError as error:
        print(error, file=sys.stderr)
        return 2
    Path(told["answer"]).write_text(json.dumps(asdict(verdict)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
