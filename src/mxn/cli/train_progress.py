"""How a training run is followed in a terminal: steps as they come, and how it stands."""

from __future__ import annotations

import json
import logging
import statistics
import sys
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from mxn.train.run.job import Job

_POLL_S = 0.2
_LINE_S = 1.0  # between two lines for people


class Progress:
    """Follows the metrics of a run while it runs: lines for people, or JSON for programs."""

    def __init__(self, job: Job, as_json: bool) -> None:
        from mxn.train.run.counts_log import read_all
        from mxn.train.run.following import Following
        from mxn.train.run.job import metrics_path

        self._job, self._as_json = job, as_json
        self._path, self._out = metrics_path(job), Path(job.out)
        self._at = self._path.stat().st_size if self._path.is_file() else 0
        self._shown_s = 0.0
        self._kept: dict[str, Any] | None = None
        self._recent_s: deque[float] = deque(maxlen=8)
        self._changes = set(read_all(self._out))
        self._following = Following(self._read, every_s=_POLL_S, name="mxn-progress")

    def __enter__(self) -> Progress:
        self._following.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._following.__exit__()
        if self._kept is not None and not self._as_json:
            self._print(self._kept)  # the last step is never left out

    def _read(self) -> None:
        if self._as_json:
            self._events()
        if not self._path.is_file():
            return
        size = self._path.stat().st_size
        if size < self._at:  # ranks started again behind a checkpoint: later lines are gone
            self._at = 0 if size == 0 else size
        with self._path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.splitlines():
            self._step(json.loads(line))

    def _events(self) -> None:
        """Print what ranks decided about their micro-batches; people hear it of the supervisor."""
        from mxn.train.run.counts_log import read_all

        for change in read_all(self._out):
            if change not in self._changes:
                self._changes.add(change)
                typer.echo(json.dumps({"event": "micro_batches", **asdict(change)}))

    def _step(self, told: dict[str, Any]) -> None:
        from mxn.train.run.session import predicted

        forecast = predicted(self._out)
        if forecast is not None:
            told["predicted_s"] = forecast["prediction"]["iteration_s"]
        if self._job.steps is not None:
            told["num_steps"] = self._job.steps
        self._recent_s.append(told["seconds"])
        told["usual_s"] = statistics.median(self._recent_s)
        if self._as_json:
            typer.echo(json.dumps(told))
            return
        self._kept = told
        if time.monotonic() - self._shown_s >= _LINE_S:
            self._print(told)

    def _print(self, told: dict[str, Any]) -> None:
        self._shown_s, self._kept = time.monotonic(), None
        say(step_line(told))


def step_line(told: dict[str, Any]) -> str:
    """Return a step for people: loss, real and predicted time side by side, speed, what is left.

    >>> step_line({"step": 9, "num_steps": 20, "loss": 2.5, "seconds": 1.1, "predicted_s": 1.0,
    ...            "tokens_per_s": 930.0})
    'step 10/20  loss 2.5000  1.1 s (predicted 1 s, +10.0%)  930 tokens/s  11 s left'
    """
    from mxn.units import format_seconds

    done, total = told["step"] + 1, told.get("num_steps")
    loss = "not finite" if told["loss"] is None else f"{told['loss']:.4f}"  # of a step left out
    parts = [f"step {done}" + (f"/{total}" if total else ""), f"loss {loss}"]
    time_text = format_seconds(told["seconds"])
    if told.get("predicted_s"):
        off = told["seconds"] / told["predicted_s"] - 1
        time_text += f" (predicted {format_seconds(told['predicted_s'])}, {off:+.1%})"
    rate = f"{told['tokens_per_s']:,.0f} tokens/s"
    learned = told.get("learned_tokens_per_s", told["tokens_per_s"])
    if learned < 0.995 * told["tokens_per_s"]:  # questions of chats, and ends of rows
        rate += f", {learned:,.0f} learned"
    parts += [time_text, rate]
    if not told.get("is_taken", 1):
        parts.append(f"left out: gradients beyond float16 (loss scale {told['loss_scale']:g})")
    if total:
        usual_s = told.get("usual_s", told["seconds"])  # one slow step says little about the rest
        parts.append(f"{format_seconds((total - done) * usual_s)} left")
    return "  ".join(parts)


class Voice(logging.Handler):
    """Prints warnings of the trainer and, once, what the supervisor both says and logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())

    def say(self, text: str) -> None:
        if text != self._last:
            say(text)
        self._last = text


def status_lines(
    path: Path, told: Any, forecast: dict[str, Any] | None, counts: dict[str, Any] | None
) -> list[str]:
    """Return how a job goes for people. `counts`: as `session.micro_batches` has them."""
    alive = "" if told.is_alive or told.phase in ("done", "stopped", "failed") else ", not running"
    lines = [
        f"{told.job}  {path}  {told.phase}{alive}" + (f": {told.reason}" if told.reason else "")
    ]
    lines.append(
        f"  groups {', '.join(told.groups)}; launch {told.launch}, {told.restarts} restarts"
    )
    for group, reason in told.dropped.items():
        lines.append(f"  without {group}: {reason}")
    if told.last:
        last = dict(told.last)
        if forecast is not None:
            last["predicted_s"] = forecast["prediction"]["iteration_s"]
        lines.append(f"  {step_line(last)}")
    kept = "none" if told.checkpoint_step is None else f"step {told.checkpoint_step}"
    lines.append(f"  checkpoint {kept}; plan {told.plan or 'none'}")
    if counts is not None:
        now, planned = (":".join(map(str, counts[key])) for key in ("now", "planned"))
        since = f"since step {counts['since_step'] + 1}, as measured"
        lines.append(f"  micro-batches {now} {since}; planned {planned}")
    return lines + [f"  {text}" for text in told.said]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
