"""`mxn train`: one training job over chips of different makers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mxn.cli import train_run
from mxn.cli.options import Json
from mxn.errors import ConfigError

if TYPE_CHECKING:
    from mxn.train.plan.plan import TrainPlan
    from mxn.train.run.job import Job
    from mxn.train.run.prepare import Task

app = typer.Typer(
    help="One training job over chips of different makers: profile, plan, run.",
    no_args_is_help=True,
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A job file, such as job.yaml.")]
MaybeJob = Annotated[
    Path | None, typer.Argument(metavar="[JOB]", help="A job file; or --model with --cluster.")
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Measure everything again, also what is stored.")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Without a job: a folder with a config.json, or a known model."),
]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="Without a job: a TOML file with chips and links, or two-chips-768, six-chips-1000.",
    ),
]
# None where not given: what a job says itself is refused beside one, not passed over.
SeqTokens = Annotated[
    int | None,
    typer.Option("--seq-tokens", help="Without a job: tokens of a row, else 4096."),
]
PlanSeqTokens = Annotated[
    int | None,
    typer.Option("--seq-tokens", help="Without a job: tokens of a row, else the plan's."),
]
Rows = Annotated[
    int | None, typer.Option("--global-batch", help="Without a job: rows of a step, else 256.")
]
PlanRows = Annotated[
    int | None,
    typer.Option("--global-batch", help="Without a job: rows of a step, which are the plan's."),
]
PlanDtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Without a job: float32, bfloat16, float16, else bfloat16."),
]
MicroBatches = Annotated[
    str | None,
    typer.Option("--micro-batch", help="Rows of a micro-batch, such as 4 or 1,2,4."),
]
PlanMicroBatches = Annotated[
    str | None,
    typer.Option(
        "--micro-batch", help="Without a job: rows of a micro-batch, such as 4 or 1,2,4 to try."
    ),
]
PlanFresh = Annotated[
    bool,
    typer.Option("--fresh", help="With a job: measure everything again, also what is stored."),
]
Timeline = Annotated[
    Path | None,
    typer.Option("--timeline", help="Write a picture of a step: a file that ends in .svg."),
]

app.command("run")(train_run.run)
app.command("resume")(train_run.resume)
app.command("status")(train_run.status)
app.command("export")(train_run.export)
app.command("drop")(train_run.drop)
app.command("add")(train_run.add)


@app.command("profile")
def profile(
    job: JobFile,
    micro_batch: MicroBatches = None,
    fresh: Fresh = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            min=0,
            help="Measure everything again; while the machine is not steady, begin another round "
            "for so long, else for 60.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure layers and links on the devices of JOB, or show what was measured before."""
    from mxn.cli.train_show import profile_json, profile_lines
    from mxn.train.run.measure import Quality, measure
    from mxn.train.run.prepare import with_devices

    found = measure(
        with_devices(_read(job)), micro_batches=_sizes(micro_batch),
        fresh=fresh or seconds is not None,
        quality=Quality(seconds=60.0 if seconds is None else seconds), on_progress=_say,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(profile_json(found), indent=2))
        return
    for line in profile_lines(found):
        typer.echo(line)
    _say("found in MXN_HOME/profiles" if found.is_reused else "stored in MXN_HOME/profiles")


@app.command("plan")
def plan(
    job: MaybeJob = None,
    model: ModelOption = None,
    cluster: ClusterOption = None,
    seq_tokens: SeqTokens = None,
    global_batch: Rows = None,
    micro_batch: PlanMicroBatches = None,
    dtype: PlanDtype = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the plan here, for a job's `plan:`.")
    ] = None,
    timeline: Timeline = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say why: what is lost where, what would help.")
    ] = False,
    fresh: PlanFresh = False,
    as_json: Json = False,
) -> None:
    """Find the best plan for JOB on its devices, or for a model on a cluster that nobody has.

    Without a job nothing is measured: chips are derived from their data sheets. A job says itself
    what its model, rows, micro-batch and dtype are, so options for those are refused beside one.
    """
    from mxn.cli.train_show import found_json, others_lines, plan_lines

    task = _task(
        job, model, cluster, seq_tokens=seq_tokens, rows=global_batch,
        micro_batches=_sizes(micro_batch), dtype=dtype, fresh=fresh,
    )  # fmt: skip
    found = task.search()
    best = found.best
    if out is not None:
        out.write_text(best.plan.to_json() + "\n", encoding="utf-8")
        _say(f"plan written to {out}")
    if timeline is not None:
        _draw(task, best.plan, timeline)
    bounds = task.bounds()
    why = task.explain(found, bounds) if explain else None
    if as_json:
        typer.echo(json.dumps(found_json(found, bounds, why), indent=2))
        return
    for line in plan_lines(best.plan, best.prediction, task):
        typer.echo(line)
    for line in why.lines() if why else others_lines(found, bounds):
        typer.echo(line)


@app.command("simulate")
def simulate(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan: `plan --out PLAN`.")],
    job: MaybeJob = None,
    model: ModelOption = None,
    cluster: ClusterOption = None,
    seq_tokens: PlanSeqTokens = None,
    global_batch: PlanRows = None,
    dtype: PlanDtype = None,
    timeline: Timeline = None,
    as_json: Json = False,
) -> None:
    """Simulate a step of PLAN pass by pass, on the devices of JOB or on a cluster file's."""
    from mxn.cli.train_show import plan_lines, simulation_json
    from mxn.train.plan.picture import plan_text
    from mxn.train.run.prepare import read_plan

    chosen = read_plan(plan_file)
    rows = chosen.micro_batches * chosen.micro_batch
    if job is None:
        if global_batch not in (None, rows):
            raise ConfigError(f"the plan has steps of {rows} rows, not {global_batch}")
        global_batch, seq_tokens = rows, seq_tokens or chosen.seq_tokens
    task = _task(
        job, model, cluster, seq_tokens=seq_tokens, rows=global_batch,
        micro_batches=() if job else (chosen.micro_batch,), dtype=dtype,
    )  # fmt: skip
    found = task.simulate(chosen)
    if timeline is not None:
        _draw(task, chosen, timeline)
    if as_json:
        typer.echo(json.dumps(simulation_json(found), indent=2))
        return
    for line in plan_lines(chosen, found.prediction, task):
        typer.echo(line)
    typer.echo("")
    typer.echo(plan_text(found))


def _draw(task: Task, plan: TrainPlan, path: Path) -> None:
    """Write the picture of a simulated step."""
    from mxn.train.plan.picture import plan_svg

    if path.suffix != ".svg":
        raise ConfigError(f"--timeline {str(path)!r} does not end in .svg")
    path.write_text(plan_svg(task.simulate(plan)), encoding="utf-8")
    _say(f"picture written to {path}")


def _task(
    job: Path | None,
    model: str | None,
    cluster: str | None,
    *,
    seq_tokens: int | None,
    rows: int | None,
    micro_batches: tuple[int, ...],
    dtype: str | None,
    fresh: bool = False,
) -> Task:
    """Raises: ConfigError for options that what is planned for does not have."""
    from mxn.cli.replica import resolve_model
    from mxn.train.run.from_cluster import task_of_cluster
    from mxn.train.run.prepare import task_of_job

    if job is not None:
        given = {
            "--model": model, "--cluster": cluster, "--seq-tokens": seq_tokens,
            "--global-batch": rows, "--micro-batch": micro_batches or None, "--dtype": dtype,
        }  # fmt: skip
        if names := [name for name, value in given.items() if value is not None]:
            raise ConfigError(
                f"a job says itself what {', '.join(names)} would say",
                hint=f"leave {', '.join(names)} out, or change the job file",
            )
        return task_of_job(_read(job), fresh=fresh, on_progress=_say)
    if model is None or cluster is None:
        raise ConfigError(
            "nothing to plan for", hint="name a job file, or both --model and --cluster"
        )
    if fresh:
        raise ConfigError("--fresh measures again, and without a job nothing is measured")
    return task_of_cluster(
        _model_folder(model, resolve_model), cluster,
        seq_tokens=4096 if seq_tokens is None else seq_tokens, rows=256 if rows is None else rows,
        micro_batches=micro_batches, dtype=dtype or "bfloat16",
    )  # fmt: skip


def _model_folder(model: str, resolve: Callable[[str], Path]) -> Path:
    """A folder or config.json as it is, without weights; else what the catalogue or hub knows."""
    path = Path(model).expanduser()
    if path.is_file() and path.name == "config.json":
        return path.parent
    return path if (path / "config.json").is_file() else resolve(model)


def _read(path: Path) -> Job:
    from mxn.train.run.job_file import read_job

    return read_job(path)


def _sizes(text: str | None) -> tuple[int, ...]:
    """Return the rows in ``1,2,4``. Raises: ConfigError."""
    if text is None:
        return ()
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--micro-batch {text!r} is no list of whole numbers such as 1,2,4")
    return sizes


def _say(text: str) -> None:
    print(text, file=sys.stderr)
