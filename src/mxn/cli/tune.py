"""`mxn tune`: measure on this machine what a model's kernels should do, and keep it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mxn.cli.options import Device, Dtype, Json, Model, Threads

if TYPE_CHECKING:
    from mxn.chips.chip import Device as ChipDevice

_PROMPT_TOKENS = 512  # of one calibration prompt


def tune(
    model: Model,
    weights: Annotated[
        str,
        typer.Option(help="f32, bf16, int8, int6, int4, int4-g32, …; of a packed model: its own."),
    ] = "int8",
    text: Annotated[
        Path | None, typer.Option(help="Prompts for the calibration. Default: a text of mxn's own.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Measure each matrix of MODEL and the range of its attention scores on this machine.

    On a GPU: up to how many rows each Triton product of MODEL is the fastest. Later loads of the
    model read what is stored, and say so in `mxn doctor` and the log.
    """
    from mxn.chips import find_device

    chosen = find_device(device)
    if chosen.torch_device == "cpu":
        _tune_native(model, weights, text, threads, as_json)
    else:
        _tune_products(model, chosen, dtype, as_json)


def _tune_products(model: str, device: ChipDevice, dtype: str, as_json: bool) -> None:
    """Measure the ways of the products of `model` on a GPU."""
    from mxn.cli.replica import resolve_model
    from mxn.engine.load import dtype_for
    from mxn.errors import CapacityError, UnsupportedError
    from mxn.kernels.tune import Busy
    from mxn.models.load import load_model

    directory = resolve_model(model)
    loaded = load_model(directory, device, dtype_for(directory, device, dtype)[0])
    ops = getattr(loaded.model, "ops", None)
    if ops is None:
        raise UnsupportedError(f"{loaded.family} has no products to measure on {device.id}")
    try:
        found = ops.measure_products(lambda shape: print(f"measuring {shape} …", file=sys.stderr))
    except Busy as busy:
        raise CapacityError(
            f"not measured: {busy}", hint="run it when the machine is idle"
        ) from busy
    if as_json:
        typer.echo(json.dumps({"choices": found, "table": str(ops.table_path)}, indent=2))
        return
    for shape, bounds in found.items():
        typer.echo(f"linear[{shape}]".ljust(42) + f" {bounds}")
    typer.echo(f"stored in {ops.table_path}")


def _tune_native(model: str, weights: str, text: Path | None, threads: int, as_json: bool) -> None:
    """Measure the native kernels of a processor, and calibrate attention."""
    from mxn.chips import find_device
    from mxn.cli.replica import resolve_model
    from mxn.engine.config import EngineConfig
    from mxn.kernels.native import formats
    from mxn.models.checkpoint import read_json
    from mxn.models.load import load_model
    from mxn.models.native import calibrate
    from mxn.models.native.files import is_artifact
    from mxn.models.native.settle import table, use_maxima
    from mxn.models.tokenizer import Tokenizer

    directory = resolve_model(model)
    num_threads = EngineConfig(model=model, threads=threads).num_threads
    format = None if is_artifact(directory) else formats.parse(weights)
    print("measuring each shape …", file=sys.stderr)
    loaded = load_model(
        directory, find_device("cpu"), "float32", format=format, num_threads=num_threads
    )
    native = loaded.model
    body = text.read_text(encoding="utf-8") if text else _default_text()
    ids = Tokenizer.load(directory).encode(body)
    size = min(_PROMPT_TOKENS, loaded.max_context)
    prompts = [ids[start : start + size] for start in range(0, min(len(ids), 8 * size), size)]
    print(f"calibrating on {len(prompts)} prompts …", file=sys.stderr)
    maxima = calibrate.calibrate(native, prompts)  # type: ignore[arg-type]
    name = calibrate.fingerprint(read_json(directory / "config.json"), native)  # type: ignore[arg-type]
    path = calibrate.store(name, maxima, prompts=str(text) if text else "mxn's own text")
    notes = loaded.kernels | {"maximum": use_maxima(native, maxima)}  # type: ignore[arg-type]
    if as_json:
        found = {"choices": notes, "calibration": str(path), "table": str(table().path)}
        ranges = [[m.low, m.high, m.phi, m.margin] for m in maxima]
        typer.echo(json.dumps(found | {"layers": ranges}, indent=2))
        return
    for what, choice in notes.items():
        typer.echo(f"{what:42} {choice}")
    low, high = min(m.low for m in maxima), max(m.high for m in maxima)
    typer.echo(f"row maxima from {low:.1f} to {high:.1f} over {maxima[0].rows} rows a layer")
    typer.echo(f"stored in {table().path} and {path}")


def _default_text() -> str:
    """Return a text that ships with mxn: the cards of its models, English prose and tables."""
    from mxn.models.catalogue import shipped_dir

    cards = sorted(shipped_dir().glob("*/README.md"))
    return "\n".join(card.read_text(encoding="utf-8") for card in cards)
