"""`mxn run`: one prompt through a model, without a server."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Annotated, Any

import typer

from mxn.cli.options import (
    Device,
    Dtype,
    Json,
    Kv,
    MaxContext,
    Model,
    Speculation,
    Threads,
    Weights,
)


def run(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to go on from; `-` or none: standard input.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to make at most.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="0: greedy; by default what the model recommends.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the answer repeatable.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    weights: Weights = None,
    kv: Kv = None,
    speculation: Speculation = None,
    threads: Threads = 0,
    max_context: MaxContext = None,
    as_json: Json = False,
) -> None:
    """Continue PROMPT with MODEL and print the text as it comes."""
    text = sys.stdin.read() if prompt in (None, "-") else str(prompt)
    from mxn.cli.replica import config_for

    config = config_for(
        model, device=device, dtype=dtype, weights=weights, kv=kv, threads=threads,
        max_context=max_context, speculation=speculation,
    )  # fmt: skip
    asyncio.run(_run(config, text, max_tokens, temperature, seed, is_chat=chat, as_json=as_json))


async def _run(
    config: Any,
    text: str,
    max_tokens: int,
    temperature: float | None,
    seed: int | None,
    *,
    is_chat: bool,
    as_json: bool,
) -> None:
    from mxn.cli.replica import start_replica
    from mxn.engine.protocol import Generate

    replica = await start_replica(config)
    try:
        prompt_ids = replica.prompt_ids(text, is_chat=is_chat)
        sampling = replica.sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
        request = Generate(request_id="run", prompt_ids=prompt_ids, sampling=sampling)
        started_s = time.perf_counter()
        parts, last = [], None
        async for delta in replica.client.generate(request):
            parts.append(delta.text)
            last = delta
            if not as_json:
                sys.stdout.write(delta.text)
                sys.stdout.flush()
        assert last is not None
        elapsed_s = time.perf_counter() - started_s
    finally:
        await replica.client.close()
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "text": "".join(parts),
                    "finish_reason": last.finish_reason,
                    "prompt_tokens": last.prompt_tokens,
                    "completion_tokens": last.completion_tokens,
                    "seconds": round(elapsed_s, 4),
                }
            )
        )
        return
    rate = last.completion_tokens / elapsed_s
    print(
        f"\n[{last.completion_tokens} tokens, {rate:.1f} tokens/s, {last.finish_reason}]",
        file=sys.stderr,
    )
