"""The comparison: ours and plain transformers, interleaved, the same requests, medians, ratios.

Start at `compare`. Prints nothing itself; `cli/bench.py` shows and stores the result.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mxn.bench.peers import TransformersPeer
from mxn.bench.workload import Request, Workload, decode, mixed, prefill
from mxn.errors import InternalError

# A greedy token counts as right when its logit in the peer is this close to the peer's best, as a
# part of the spread of the logits: two tokens that differ by less are a tie in that dtype.
_TIE = {"float32": 1e-4, "bfloat16": 0.03, "float16": 0.01}

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One workload: tokens/s of each contender (median), and ours divided by each peer."""

    workload: str
    counted: str
    tokens_per_s: dict[str, float]
    spread: dict[str, tuple[float, float]]  # slowest and fastest round
    ratios: dict[str, float]  # median of the ratios round by round


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    schema: str = "mxn-bench-1"
    shape: str
    date: str
    basis: str = "measured"
    machine: dict[str, Any]
    versions: dict[str, str]
    params: dict[str, Any]
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much to measure."""

    rounds: int = 3
    prompt_tokens: int = 128
    new_tokens: int = 64
    concurrency: int = 16
    threads: int = 0
    dtype: str = "auto"
    device: str = "auto"


def workloads(vocab_size: int, plan: Plan) -> list[Workload]:
    prompt, new, many = plan.prompt_tokens, plan.new_tokens, plan.concurrency
    return [
        prefill(vocab_size, prompt, 1),
        prefill(vocab_size, 4 * prompt, 1),
        decode(vocab_size, prompt, new, 1),
        decode(vocab_size, prompt, new, many),
        mixed(vocab_size, many, 2 * new),
    ]


def compare(directory: Path, shape: str, plan: Plan, note: Note) -> Report:
    """Measure all workloads in `plan.rounds` interleaved rounds.

    Raises: InternalError when our tokens are not the peer's: a wrong answer has no speed.
    """
    import torch

    from mxn.engine.config import EngineConfig
    from mxn.engine.local import LocalEngine

    config = EngineConfig(
        model=str(directory), device=plan.device, dtype=plan.dtype, threads=plan.threads,
        prefix_caching=False,  # the rounds repeat the prompts: hits would be no measurement
        max_sequences=max(64, plan.concurrency), max_context=4 * plan.prompt_tokens + 1024,
    )  # fmt: skip
    torch.set_num_threads(config.num_threads)
    note("loading mxn")
    ours = LocalEngine.load(config)
    note("loading transformers")
    peer = TransformersPeer(
        directory, ours.core.info.dtype, ours.core.info.device.removesuffix(":0")
    )
    contenders: dict[str, Callable[[tuple[Request, ...]], list[list[int]]]] = {
        "mxn": lambda requests: _ours(ours, requests),
        "transformers": peer.one_by_one,
        "transformers, static batch": peer.static_batch,
    }
    plans = workloads(ours.core.info.vocab_size, plan)
    note("checking that both give the same tokens")
    check_tokens(ours, peer, plans[0].requests + plans[-1].requests[:3], ours.core.info.dtype)
    rows = [_measure(work, contenders, plan.rounds, note) for work in plans]
    return Report(
        shape=shape,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=_machine(ours.core.info),
        versions=_versions(),
        params={
            "rounds": plan.rounds, "dtype": ours.core.info.dtype, "threads": config.num_threads,
            "kernels": ours.core.info.kernels,
        },
        rows=rows,
    )  # fmt: skip


def _ours(engine: Any, requests: tuple[Request, ...]) -> list[list[int]]:
    from mxn.engine.protocol import SamplingParams

    outputs = engine.generate(
        [list(request.prompt_ids) for request in requests],
        [
            SamplingParams(temperature=0.0, max_tokens=request.new_tokens, ignore_eos=True)
            for request in requests
        ],
    )
    return [output.token_ids for output in outputs]


def check_tokens(
    ours: Any, peer: TransformersPeer, requests: tuple[Request, ...], dtype: str
) -> None:
    """Compare the first token of each request with the peer's logits behind the same prompt."""
    firsts = _ours(ours, tuple(Request(request.prompt_ids, 1) for request in requests))
    for request, token_ids in zip(requests, firsts, strict=True):
        logits = peer.logits(request.prompt_ids)
        gap = (logits.max() - logits[token_ids[0]]) / (logits.max() - logits.min())
        if gap > _TIE[dtype]:
            raise InternalError(
                f"token {token_ids[0]} behind a prompt of {len(request.prompt_ids)} tokens is"
                f" {gap:.4f} of the logits' spread below the peer's best; {_TIE[dtype]} is allowed"
            )


def _measure(
    work: Workload,
    contenders: dict[str, Callable[[tuple[Request, ...]], list[list[int]]]],
    rounds: int,
    note: Note,
) -> Row:
    if len(work.requests) == 1:  # one request: both ways of the peer are the same
        contenders = dict(list(contenders.items())[:2])
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds + 1):
        for name, run in contenders.items():
            note(f"{work.name}: {name}, round {index} of {rounds}")
            if index == 0 and len(work.requests) > 1 and name == "transformers":
                continue  # its warm-up is the longest run of all and warms nothing more
            started_s = time.perf_counter()
            answers = run(work.requests)
            elapsed_s = time.perf_counter() - started_s
            wanted = [request.new_tokens for request in work.requests]
            if [len(answer) for answer in answers] != wanted:
                raise InternalError(f"{name} gave answers of other lengths than asked for")
            if index:  # round 0 warms up
                rates[name].append(work.counted_tokens / elapsed_s)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return Row(
        workload=work.name,
        counted=work.what,
        tokens_per_s={name: round(value, 2) for name, value in medians.items()},
        spread={name: (round(min(v), 2), round(max(v), 2)) for name, v in rates.items()},
        ratios={
            name: round(statistics.median(a / b for a, b in zip(rates["mxn"], v, strict=True)), 3)
            for name, v in rates.items()
            if name != "mxn"
        },
    )


def _machine(info: Any) -> dict[str, Any]:
    return {"chip": info.chip, "device": info.device, "system": platform.platform()}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("mxn", "torch", "transformers")}
