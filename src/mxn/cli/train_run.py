"""`mxn train run`, `resume`, `status`, `export`, `drop`, `add`: a job from start to model."""

from __future__ import annotations

import json
import logging
import statistics
import sys
import threading
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxn.cli.options import Json

if TYPE_CHECKING:
    from mxn.train.run.job import Job

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A job file, such as job.yaml.")]


def _runs() -> list[str]:
    """Complete the folder of a run."""
    return sorted(str(path.parent) for path in Path("runs").glob("*/job.json"))


def _groups(context: typer.Context) -> list[str]:
    """Complete the name of a group of the run that was named before it."""
    from mxn.errors import MxnError
    from mxn.train.run.session import kept_job

    try:
        return [group.name for group in kept_job(Path(context.params["folder"])).devices]
    except (KeyError, TypeError, MxnError):
        return []


Folder = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Folder of a job: its `out`.", autocompletion=_runs),
]
Group = Annotated[
    str,
    typer.Argument(metavar="GROUP", help="Name of a group of the job.", autocompletion=_groups),
]
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="Run on this Ray cluster's machines; or auto."),
]
StepsAsJson = Annotated[
    bool, typer.Option("--json", help="Print a line of JSON for each step on stdout.")
]

_POLL_S = 0.2
_LINE_S = 1.0  # between two lines for people


def run(
    job: JobFile,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run, in place of the job's.")
    ] = None,
    ray: Ray = None,
    as_json: StepsAsJson = False,
) -> None:
    """Plan JOB, check its devices and train; goes on from its last checkpoint if there is one."""
    from mxn.train.run.job_file import read_job

    _run(read_job(job, out=out), ray, as_json)


def resume(
    folder: Folder,
    ray: Ray = None,
    as_json: StepsAsJson = False,
) -> None:
    """Go on with the job in RUN from its last checkpoint."""
    from mxn.train.run.session import kept_job

    _run(kept_job(folder), ray, as_json)


def _run(job: Job, ray: str | None, as_json: bool) -> None:
    from mxn.train.run.session import run_job

    voice = _Voice()
    logger = logging.getLogger("mxn.train")
    logger.addHandler(voice)
    try:
        with Progress(job, as_json):
            state = run_job(job, ray=ray, on_say=voice.say)
    finally:
        logger.removeHandler(voice)
    if state.phase == "done":
        _say(f"done; next: mxn train export {_shown(Path(job.out))} --out MODEL")
        return
    if state.phase == "stopped":
        _say(f"stopped ({state.reason}); go on with: mxn train resume {_shown(Path(job.out))}")
        raise typer.Exit(130)
    print(f"error: the job {state.phase}: {state.reason}", file=sys.stderr)
    raise typer.Exit(2)


def status(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Folder of a job; default: all in runs/.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how the job in RUN goes: phase, step, loss, groups, what happened."""
    from mxn.errors import NotFoundError
    from mxn.train.run.session import predicted
    from mxn.train.run.supervise.status import read

    folders = [folder] if folder else sorted(p.parent for p in Path("runs").glob("*/status.json"))
    if not folders:
        raise NotFoundError("no training job in runs/", hint="name the `out` folder of a job")
    found = [(path, read(path), predicted(path)) for path in folders]
    if as_json:
        rows = [
            asdict(told) | {"folder": str(path), "predicted": forecast}
            for path, told, forecast in found
        ]
        typer.echo(json.dumps(rows[0] if folder else rows, indent=2))
        return
    for path, told, forecast in found:
        for line in _status_lines(path, told, forecast):
            typer.echo(line)


def export(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", help="New folder for the model.")],
    step: Annotated[
        int | None, typer.Option("--step", help="Step of the checkpoint; default: the newest.")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a LoRA job: only the adapter, not merged.")
    ] = False,
) -> None:
    """Write the model that RUN trained as a Hugging Face folder that `mxn serve` runs."""
    from mxn.train.run.session import export as export_

    of_step = export_(folder, out, step=step, is_adapter=adapter)
    _say(f"wrote the {'adapter' if adapter else 'model'} of step {of_step} to {out}")
    if adapter:
        from mxn.train.run.session import kept_job

        source = kept_job(folder).model.source
        typer.echo(f"mxn serve {source} --lora {out.name}={out}")
    else:
        typer.echo(f"mxn serve {out}")


def drop(folder: Folder, group: Group) -> None:
    """Let the running job in RUN go on without GROUP: it is planned again for the others."""
    _ask(folder, "drop", group)
    _say(f"asked to go on without {group!r}; see: mxn train status {folder}")


def add(folder: Folder, group: Group) -> None:
    """Take GROUP back into the running job in RUN."""
    _ask(folder, "grow", group)
    _say(f"asked to take {group!r} back; see: mxn train status {folder}")


def _ask(folder: Path, action: Any, group: str) -> None:
    from mxn.errors import UserError
    from mxn.train.run.control import ask
    from mxn.train.run.session import kept_job
    from mxn.train.run.supervise.status import read

    kept_job(folder).group(group)  # a wrong name is an error here, with the right ones
    told = read(folder)
    if not told.is_alive:
        raise UserError(
            f"the job in {folder} does not run: it is {told.phase}",
            hint=f"start it with `mxn train resume {folder}`",
        )
    ask(folder, action, group)


# -- progress ----------------------------------------------------------------------------------


class Progress:
    """Follows the metrics of a run while it runs: lines for people, or JSON for programs."""

    def __init__(self, job: Job, as_json: bool) -> None:
        from mxn.train.run.job import metrics_path

        self._job, self._as_json = job, as_json
        self._path, self._out = metrics_path(job), Path(job.out)
        self._at = self._path.stat().st_size if self._path.is_file() else 0
        self._shown_s = 0.0
        self._kept: dict[str, Any] | None = None
        self._recent_s: deque[float] = deque(maxlen=8)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mxn-progress", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._is_over.wait(_POLL_S):
            self._read()
        self._read()
        if self._kept is not None and not self._as_json:
            self._print(self._kept)  # the last step is never left out

    def _read(self) -> None:
        if not self._path.is_file():
            return
        size = self._path.stat().st_size
        if size < self._at:  # ranks started again behind a checkpoint: later lines are gone
            self._at = 0 if size == 0 else size
        with self._path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.splitlines():
            self._step(json.loads(line))

    def _step(self, told: dict[str, Any]) -> None:
        from mxn.train.run.session import predicted

        forecast = predicted(self._out)
        if forecast is not None:
            told["predicted_s"] = forecast["prediction"]["iteration_s"]
        if self._job.steps is not None:
            told["num_steps"] = self._job.steps
        self._recent_s.append(told["seconds"])
        told["usual_s"] = statistics.median(self._recent_s)
        if self._as_json:
            typer.echo(json.dumps(told))
            return
        self._kept = told
        if time.monotonic() - self._shown_s >= _LINE_S:
            self._print(told)

    def _print(self, told: dict[str, Any]) -> None:
        self._shown_s, self._kept = time.monotonic(), None
        _say(step_line(told))


def step_line(told: dict[str, Any]) -> str:
    """Return a step for people: loss, real and predicted time side by side, speed, what is left.

    >>> step_line({"step": 9, "num_steps": 20, "loss": 2.5, "seconds": 1.1, "predicted_s": 1.0,
    ...            "tokens_per_s": 930.0})
    'step 10/20  loss 2.5000  1.1 s (predicted 1 s, +10.0%)  930 tokens/s  11 s left'
    """
    from mxn.units import format_seconds

    done, total = told["step"] + 1, told.get("num_steps")
    parts = [f"step {done}" + (f"/{total}" if total else ""), f"loss {told['loss']:.4f}"]
    time_text = format_seconds(told["seconds"])
    if told.get("predicted_s"):
        off = told["seconds"] / told["predicted_s"] - 1
        time_text += f" (predicted {format_seconds(told['predicted_s'])}, {off:+.1%})"
    parts += [time_text, f"{told['tokens_per_s']:,.0f} tokens/s"]
    if total:
        usual_s = told.get("usual_s", told["seconds"])  # one slow step says little about the rest
        parts.append(f"{format_seconds((total - done) * usual_s)} left")
    return "  ".join(parts)


class _Voice(logging.Handler):
    """Prints warnings of the trainer and, once, what the supervisor both says and logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())

    def say(self, text: str) -> None:
        if text != self._last:
            _say(text)
        self._last = text


def _status_lines(path: Path, told: Any, forecast: dict[str, Any] | None) -> list[str]:
    alive = "" if told.is_alive or told.phase in ("done", "stopped", "failed") else ", not running"
    lines = [
        f"{told.job}  {path}  {told.phase}{alive}" + (f": {told.reason}" if told.reason else "")
    ]
    lines.append(
        f"  groups {', '.join(told.groups)}; launch {told.launch}, {told.restarts} restarts"
    )
    for group, reason in told.dropped.items():
        lines.append(f"  without {group}: {reason}")
    if told.last:
        last = dict(told.last)
        if forecast is not None:
            last["predicted_s"] = forecast["prediction"]["iteration_s"]
        lines.append(f"  {step_line(last)}")
    kept = "none" if told.checkpoint_step is None else f"step {told.checkpoint_step}"
    lines.append(f"  checkpoint {kept}; plan {told.plan or 'none'}")
    return lines + [f"  {text}" for text in told.said]


def _shown(path: Path) -> str:
    """Return a path as a person would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
