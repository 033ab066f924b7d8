"""`mxn chips`: the devices of this machine, what they reach, and what is known about chips."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxn.cli.options import Device as DeviceOption
from mxn.cli.options import Json

if TYPE_CHECKING:
    from mxn.chips.chip import Device
    from mxn.chips.discovery import Survey
    from mxn.chips.roofline import Measurement, Reading
    from mxn.chips.specs import Figure, Spec

app = typer.Typer(help="Devices of this machine, their measured limits, and known chips.")

# Reading of a measurement -> what it is called in a spec, with the factor from its unit to SI.
_PEAK_OF = {
    "memory read": ("memory rate", 1e9),
    "memory copy": ("memory rate", 1e9),
    "matmul float32": ("fp32", 1e12),
    "matmul bfloat16": ("bf16", 1e12),
    "matmul float16": ("fp16", 1e12),
    "matmul int8": ("int8", 1e12),
}

_SPEC_UNITS = {
    "fp16": "TFLOP/s", "bf16": "TFLOP/s", "int8": "TOP/s", "memory": "GB", "memory rate": "GB/s",
    "link": "GB/s",
}  # fmt: skip


@app.callback(invoke_without_command=True)
def chips(
    context: typer.Context,
    as_json: Json = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also print the evidence, and what was not found.")
    ] = False,
) -> None:
    """List the devices of this machine."""
    if context.invoked_subcommand is not None:
        return
    from mxn.chips import survey

    found = survey()
    if as_json:
        typer.echo(json.dumps(_as_json(found, explain), indent=2))
        return
    _print_devices(found)
    if explain:
        _print_reasons(found)
    elif found.unusable or found.broken:
        names = ", ".join([*found.unusable, *found.broken])
        print(f"not usable: {names}; `mxn chips --explain` says why", file=sys.stderr)


@app.command("measure")
def measure(
    device: DeviceOption = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of a minute, less exact.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure bandwidth, matrix throughput and launch cost, and keep the figures."""
    from mxn.chips import find_device, measured, roofline

    found = find_device(device)

    def note(title: str, done: int, total: int) -> None:
        print(f"[{done}/{total}] {title}", file=sys.stderr)

    result = roofline.measure(found, is_quick=quick, on_progress=note)
    path = measured.store(result)
    print(f"stored in {path}", file=sys.stderr)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        _print_measurement(result)


@app.command("specs")
def specs(as_json: Json = False) -> None:
    """List every known chip with its figures and their basis."""
    from mxn.chips.specs import all_specs

    known = list(all_specs().values())
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(spec) for spec in known], indent=2))
        return
    columns = ("fp16", "bf16", "int8", "memory", "memory rate", "link")
    rows = [(spec.name, *(_bound(spec, what) for what in columns)) for spec in known]
    _table(("chip", *(f"{what}\n{_SPEC_UNITS[what]}" for what in columns)), rows)
    print(
        "dense upper bounds; * assumed (press or second-hand), ~ derived, else data sheet; "
        "empty: unknown\nwith sources and published measurements: mxn chips specs --json",
        file=sys.stderr,
    )


def _as_json(found: Survey, explain: bool) -> dict[str, Any]:
    devices = [_device_row(device) for device in found.devices]
    if not explain:
        for row in devices:
            del row["evidence"]
        return {"devices": devices, "unusable": found.unusable, "broken": found.broken}
    return {
        "devices": devices,
        "unusable": found.unusable,
        "broken": found.broken,
        "absent": found.absent,
    }


def _device_row(device: Device) -> dict[str, Any]:
    from mxn.chips import free_memory, registry, utilization
    from mxn.errors import ChipError

    chip = registry.chip_of(device.vendor)
    try:
        free_bytes = free_memory(device)
    except ChipError as error:  # one silent driver must not hide the other devices
        free_bytes = None
        print(f"{device.id}: {error}", file=sys.stderr)
    return dataclasses.asdict(device) | {
        "free_bytes": free_bytes,
        "utilization": utilization(device),
        "visible_devices": chip.visible_devices,
        "environment": dict(chip.environment),
    }


def _print_devices(found: Survey) -> None:
    from mxn.chips import measured
    from mxn.units import format_bytes, format_rate

    rows = []
    for device in found.devices:
        row = _device_row(device)
        last = measured.load(device.chip)
        read = last.reading("memory read") if last else None
        busy = row["utilization"]
        rows.append((
            device.id, device.chip, device.name, format_bytes(device.memory_bytes),
            "unknown" if row["free_bytes"] is None else format_bytes(row["free_bytes"]),
            "" if busy is None else f"{busy:.0%}",
            f"{format_rate(read.value, 'B/s')} {last.basis}" if last and read else "",
        ))  # fmt: skip
    _table(("device", "chip", "name", "memory", "free", "busy", "memory read"), rows)


def _print_reasons(found: Survey) -> None:
    for device in found.devices:
        typer.echo(f"\n{device.id} is {device.chip} ({device.vendor}) because")
        for text in device.evidence:
            typer.echo(f"  {text}")
    titles = {
        "unusable": "there, but not usable by this process",
        "broken": "broken plug-ins",
        "absent": "not found",
    }
    for key, title in titles.items():
        reasons: dict[str, str] = getattr(found, key)
        if reasons:
            typer.echo(f"\n{title}")
        for name, why in reasons.items():
            typer.echo(f"  {name}: " + why.replace("\n", "\n    "))


def _print_measurement(result: Measurement) -> None:
    from mxn.chips.specs import find

    spec = find(result.chip)
    print(f"{result.device}: {result.chip}, {result.name}, {result.threads} threads, {result.date}",
          file=sys.stderr)  # fmt: skip
    rows = [_reading_row(reading, result.basis, spec) for reading in result.readings]
    _table(("quantity", "value", "basis", "peak", "of peak", "how"), rows)
    for what, why in result.unsupported.items():
        typer.echo(f"{what}: not supported: {why}")


def _reading_row(reading: Reading, basis: str, spec: Spec | None) -> tuple[str, ...]:
    name, factor = _PEAK_OF.get(reading.what, ("", 1.0))
    peak = spec.best(name) if spec and name else None
    share = f"{reading.value / (peak.value * factor):.0%}" if peak else ""
    shown = f"{peak.value:g} {peak.unit} {peak.basis}" if peak else "unknown" if name else ""
    value = _amount(reading.value, reading.unit)
    return reading.what, value, basis, shown, share, reading.note


def _amount(value: float, unit: str) -> str:
    from mxn.units import format_rate, format_seconds

    return format_seconds(value) if unit == "s" else format_rate(value, unit)


def _bound(spec: Spec, what: str) -> str:
    figure: Figure | None = spec.best(what)
    if figure is None:
        return ""
    value = figure.value / 1e9 if figure.unit == "B" else figure.value
    mark = {"assumed": "*", "derived": "~"}.get(figure.basis, "")
    return f"{value:g}{mark}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column, title in enumerate(head):
        table.add_column(title, no_wrap=column < 2)  # what a reader copies stays whole
    for row in rows:
        table.add_row(*row)
    Console().print(table)
