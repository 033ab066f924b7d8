"""`mxn bench`: mxn against plain transformers on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mxn.cli.options import Device, Dtype, Json, Threads

if TYPE_CHECKING:
    from mxn.bench.run import Report


def bench(
    shape: Annotated[
        str, typer.Option(help="Random weights in this shape: qwen3-0.6b, llama-3.2-1b, tiny.")
    ] = "qwen3-0.6b",
    model: Annotated[
        Path | None, typer.Option(help="A model directory instead of a random checkpoint.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; medians count.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Length of the prompts.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Length of the answers.")] = 64,
    concurrency: Annotated[int, typer.Option(min=2, help="Requests at the same time.")] = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to store the result in.")] = None,
    as_json: Json = False,
) -> None:
    """Compare mxn with plain transformers: prefill and decode, alone and with many requests."""
    import dataclasses

    from mxn.bench.run import Plan, compare
    from mxn.bench.shapes import ensure_checkpoint

    def note(text: str) -> None:
        print(text, file=sys.stderr)

    directory = model or ensure_checkpoint(shape, note)
    plan = Plan(
        rounds=rounds, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
        concurrency=concurrency, threads=threads, dtype=dtype, device=device,
    )  # fmt: skip
    report = compare(directory, model.name if model else shape, plan, note)
    text = json.dumps(dataclasses.asdict(report), indent=2)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"engine-{report.shape}-{report.params['dtype']}.json"
        path.write_text(text + "\n")
        note(f"stored in {path}")
    if as_json:
        typer.echo(text)
    else:
        _print(report)


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    params = report.params
    title = f"{report.shape}, {params['dtype']}, {params['threads']} threads, tokens/s (median)"
    names = list(max((row.tokens_per_s for row in report.rows), key=len))
    table = Table(title=title, box=None, header_style="bold", title_justify="left")
    for column in ("workload", "counts", *names, *(f"mxn / {name}" for name in names[1:])):
        table.add_column(column, justify="left" if column in ("workload", "counts") else "right")
    for row in report.rows:
        speeds = [f"{row.tokens_per_s[n]:.1f}" if n in row.tokens_per_s else "-" for n in names]
        ratios = [f"{row.ratios[n]:.2f}" if n in row.ratios else "-" for n in names[1:]]
        table.add_row(row.workload, f"{row.counted} tokens", *speeds, *ratios)
    # Wide enough for one line a row also where nobody's terminal says how wide it is.
    Console(width=None if sys.stdout.isatty() else 140).print(table)
