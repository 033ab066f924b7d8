"""`mxn train run`, `resume`, `status`, `export`, `drop`, `add`: a job from start to model."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxn.cli.options import Json
from mxn.cli.train_progress import Progress, Voice, say, status_lines

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

    job = kept_job(folder)
    if job.checkpoint.resume == "never":  # it meant what lay there before the run
        job = replace(job, checkpoint=replace(job.checkpoint, resume="newest"))
    _run(job, ray, as_json)


def _run(job: Job, ray: str | None, as_json: bool) -> None:
    from mxn.train.run.session import run_job

    voice = Voice()
    logger = logging.getLogger("mxn.train")
    logger.addHandler(voice)
    try:
        with Progress(job, as_json):
            state = run_job(job, ray=ray, on_say=voice.say)
    finally:
        logger.removeHandler(voice)
    if state.phase == "done":
        say(f"done; next: mxn train export {_shown(Path(job.out))} --out MODEL")
        return
    if state.phase == "stopped":
        say(f"stopped ({state.reason}); go on with: mxn train resume {_shown(Path(job.out))}")
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
    from mxn.train.run.session import micro_batches, predicted
    from mxn.train.run.supervise.status import read

    folders = [folder] if folder else sorted(p.parent for p in Path("runs").glob("*/status.json"))
    if not folders:
        raise NotFoundError("no training job in runs/", hint="name the `out` folder of a job")
    found = []
    for path in folders:
        told = read(path)
        found.append((path, told, predicted(path), micro_batches(path, told.plan)))
    if as_json:
        rows = [
            asdict(told) | {"folder": str(path), "predicted": forecast, "micro_batches": counts}
            for path, told, forecast, counts in found
        ]
        typer.echo(json.dumps(rows[0] if folder else rows, indent=2))
        return
    for row in found:
        for line in status_lines(*row):
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
    say(f"wrote the {'adapter' if adapter else 'model'} of step {of_step} to {out}")
    if adapter:
        from mxn.train.run.session import kept_job

        source = kept_job(folder).model.source
        typer.echo(f"mxn serve {source} --lora {out.name}={out}")
    else:
        typer.echo(f"mxn serve {out}")


def drop(folder: Folder, group: Group) -> None:
    """Let the running job in RUN go on without GROUP: it is planned again for the others."""
    _ask(folder, "drop", group)
    say(f"asked to go on without {group!r}; see: mxn train status {folder}")


def add(folder: Folder, group: Group) -> None:
    """Take GROUP back into the running job in RUN."""
    _ask(folder, "grow", group)
    say(f"asked to take {group!r} back; see: mxn train status {folder}")


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


def _shown(path: Path) -> str:
    """Return a path as a person would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
