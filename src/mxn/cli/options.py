"""Options that several commands share, with one help text each."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="A model directory, a GGUF file, a hub id, or a shipped model's name.")
]
Device = Annotated[
    str, typer.Option(help="Device such as cpu, cuda:0, npu:0, sim:0; auto: the best present.")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16; auto: the checkpoint's if the chip computes it."
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Weights on a CPU: plain (as --dtype), f32, bf16, int8, int6, int4, int4-g32, …"
    ),
]
Kv = Annotated[
    str | None, typer.Option(help="Cache beside packed weights: f32, bf16, int8; auto: by weights.")
]
Speculation = Annotated[
    str | None,
    typer.Option(
        help="Guess tokens and verify them: off, ngram (from the text so far), mtp (by the model)."
    ),
]
Threads = Annotated[int, typer.Option(help="CPU threads; 0: all cores this process may use.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
MaxContext = Annotated[
    int | None, typer.Option(help="Longest context in tokens; by default the model's own.")
]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Otlp = Annotated[
    str | None,
    typer.Option(
        "--otlp", metavar="URL", help="Send traces to this OpenTelemetry collector (OTLP, HTTP)."
    ),
]
Port = Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")]
ToolParser = Annotated[
    str | None,
    typer.Option(help="How models write tool calls. Default: as their chat template says."),
]
ReasoningParser = Annotated[
    str | None,
    typer.Option(help="How models write thoughts, or none. Default: as their files say."),
]
