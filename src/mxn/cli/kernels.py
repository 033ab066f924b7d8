"""`mxn kernels`: ops and their kernels, which one this device uses and why, tuning and parity."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxn.cli.options import Device, Json

if TYPE_CHECKING:
    from mxn.kernels.registry import Choice, Ops

app = typer.Typer(help="Ops, their kernels, and which one runs where and why.")

_DTYPES = ("float32", "bfloat16", "float16")
KernelDtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
Explain = Annotated[
    bool, typer.Option("--explain", help="Show the choice for each op, its reason and its times.")
]
Linear = Annotated[
    list[str] | None,
    typer.Option("--linear", metavar="KxN", help="Weight shape to measure: inputs x outputs."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again what is already stored.")]


@app.callback(invoke_without_command=True)
def kernels(
    context: typer.Context,
    device: Device = "auto",
    dtype: KernelDtype = "float32",
    explain: Explain = False,
    as_json: Json = False,
) -> None:
    """List op × kernel × chips × dtypes; with --explain what this device chose, and why."""
    if context.invoked_subcommand is not None:
        return
    ops = _bind(device, dtype)
    if explain:
        _print_choices(ops.explain(), as_json)
    else:
        _print_kernels(ops, dtype, as_json)


@app.command()
def tune(
    device: Device = "auto",
    dtype: KernelDtype = "float32",
    linear: Linear = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Measure this device's kernels now and store the times, instead of at the next model load."""
    shapes = [_shape(text) for text in linear or []]
    ops = _bind(device, dtype, fresh=fresh)
    for in_features, out_features in shapes:
        ops.choose_linear(in_features, out_features, dtype)
    _print_choices([choice for choice in ops.explain() if choice.times_us], as_json)


@app.command()
def verify(device: Device = "auto", dtype: KernelDtype = "float32", as_json: Json = False) -> None:
    """Compare every kernel of this device with naive.py; one that fails is off from then on."""
    import torch

    from mxn.chips import find_device
    from mxn.kernels import parity

    _check_dtype(dtype)
    found = find_device(device)
    results = parity.verify(found.chip, torch.device(found.torch_device), getattr(torch, dtype))
    rows = [
        {
            "op": r.op,
            "kernel": r.kernel,
            "dtype": r.dtype,
            "cases": r.num_cases,
            "worst_rms_ratio": r.worst,
            "result": "pass" if r.is_passed else "; ".join(r.failures[:3]),
        }
        for r in results
        if r.num_cases
    ]
    _print(rows, as_json)
    if not all(r.is_passed for r in results):
        raise typer.Exit(1)


def _bind(device: str, dtype: str, *, fresh: bool = False) -> Ops:
    import torch

    from mxn.chips import find_device
    from mxn.kernels.registry import Ops
    from mxn.kernels.tune import Table

    _check_dtype(dtype)
    found = find_device(device)
    if fresh:
        Table.open(found.chip).forget()
    return Ops.bind(found.torch_device, found.chip, getattr(torch, dtype))


def _check_dtype(dtype: str) -> None:
    from mxn.errors import ConfigError

    if dtype not in _DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is none of {', '.join(_DTYPES)}")


def _shape(text: str) -> tuple[int, int]:
    from mxn.errors import ConfigError

    inputs, found, outputs = text.partition("x")
    if not (found and inputs.isdigit() and outputs.isdigit() and int(inputs) and int(outputs)):
        raise ConfigError(f"cannot read {text!r} as a weight shape", hint="write 1024x4096")
    return int(inputs), int(outputs)


def _print_kernels(ops: Ops, dtype: str, as_json: bool) -> None:
    from mxn.kernels.registry import all_ops, kernels_of

    chosen = {choice.op: choice.kernel for choice in ops.explain()}
    rows = []
    for op in all_ops():
        _, rejected = ops.candidates(op, dtype)
        for entry in kernels_of(op).values():
            status = rejected.get(entry.name) or (
                "chosen" if chosen.get(op) == entry.name else "usable"
            )
            rows.append(
                {
                    "op": op,
                    "kernel": entry.name,
                    "chips": entry.chips,
                    "dtypes": ", ".join(entry.dtypes) if entry.dtypes else "any",
                    f"{ops.chip} {dtype}": status,
                }
            )
    _print(rows, as_json)


def _print_choices(choices: list[Choice], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([_choice_row(choice) for choice in choices], indent=2))
        return
    from mxn.units import format_seconds

    if not choices:
        typer.echo("nothing to show: no op here has more than one kernel", err=True)
    for choice in choices:
        name = f"{choice.op} {choice.shape}".rstrip()
        typer.echo(f"{name}: {choice.kernel} ({choice.reason})")
        for kernel, times in choice.times_us.items():
            cells = (
                f"{case.removeprefix(choice.op).strip()} {format_seconds(us / 1e6)}"
                for case, us in times.items()
            )
            typer.echo(f"    {kernel}: {', '.join(cells)}")
        for kernel, why in choice.rejected.items():
            typer.echo(f"    not {kernel}: {why}")


def _choice_row(choice: Choice) -> dict[str, Any]:
    return {
        "op": choice.op,
        "shape": choice.shape,
        "kernel": choice.kernel,
        "reason": choice.reason,
        "candidates": list(choice.candidates),
        "times_us": choice.times_us,
        "basis": "measured" if choice.times_us else None,
        "rejected": choice.rejected,
    }


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], box=None, header_style="bold")
    for row in rows:
        cells = (f"{v:.1e}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*cells)
    Console().print(table)
