"""`mxn pack`: a model with quantized weights, stored so that it loads in an instant."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from mxn.cli.options import Json, Kv, Model


def pack(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write; must not exist.")],
    weights: Annotated[
        str, typer.Option(help="f32, bf16, int8, int6, int4, int4-g32, int4-g64, int4-g128; -sym.")
    ] = "int4",
    kv: Kv = None,
    merge_lora: Annotated[
        Path | None, typer.Option(help="LoRA adapter (PEFT folder) to add to the weights first.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize MODEL for the native CPU kernels and store it; `mxn serve` takes the result."""
    from mxn.cli.replica import resolve_model
    from mxn.kernels.native import formats
    from mxn.models.load import pack_model
    from mxn.units import format_bytes

    started_s = time.perf_counter()
    format = formats.parse(weights, kv or "auto")
    num_bytes = pack_model(resolve_model(model), format, out, adapter=merge_lora)
    seconds = time.perf_counter() - started_s
    if as_json:
        found = {"path": str(out), "format": str(format), "bytes": num_bytes, "seconds": seconds}
        typer.echo(json.dumps(found))
        return
    typer.echo(f"{out}: {format_bytes(num_bytes)}, {format}, packed in {seconds:.1f} s")
