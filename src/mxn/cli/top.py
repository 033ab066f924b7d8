"""`mxn top`: what a running server or gateway does right now, model by model, chip by chip."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxn.cli.options import Json
from mxn.errors import MxnError, NotFoundError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mxn.cli.rates import Look, ModelRates, Summary


def top(
    url: Annotated[
        str | None, typer.Option(help="Address of a server; by default the newest one here.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key", "--api-key", envvar="MXN_API_KEY",
            help="Key for /load; by default `mxn up`'s, on this machine.",
        ),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="One interval, then end.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Show requests, tokens, latency, queues and money as they happen. Ctrl-C ends it.

    Rates are differences of two looks at /metrics, so the first ones come after one interval.
    """
    server = _Server(url or _newest(), key)
    summaries = server.summaries(interval)
    try:
        if once:
            _print(_whole(next(summaries)), as_json)
        elif as_json or not sys.stdout.isatty():
            for found in summaries:
                if isinstance(found, MxnError):
                    print(found, file=sys.stderr)
                else:
                    _print(found, as_json)
        else:
            _show(summaries, server.url)
    except KeyboardInterrupt:
        pass  # the only way to end it, so it is no mistake
    except BrokenPipeError:
        # Whoever read us has left; nothing more can be said, also not at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        server.close()


def _newest() -> str:
    from mxn.serve.running import list_servers

    servers = list_servers()
    if not servers:
        raise NotFoundError(
            "no mxn server runs on this machine", hint="name one: mxn top --url http://HOST:PORT"
        )
    return servers[0].url


class _Server:
    """A server that is looked at again and again, over one connection."""

    def __init__(self, url: str, key: str | None) -> None:
        import httpx

        from mxn.cli.local_key import local_key
        from mxn.cli.remote import is_here, reaching

        self.url = url.rstrip("/")
        # This machine's key is no business of others, and no proxy stands before ourselves.
        key = key or (local_key() if is_here(self.url) else None)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with reaching(self.url):
            self._http = httpx.Client(
                base_url=self.url, headers=headers, timeout=10, trust_env=not is_here(self.url)
            )

    def look(self) -> Look:
        """Raises: MxnError when it does not answer, or is no mxn server."""
        from mxn.cli.rates import Look
        from mxn.cli.remote import check, reaching

        with reaching(self.url):
            metrics = self._http.get("/metrics")
            at_s = time.monotonic()
            load, health = self._http.get("/load"), self._http.get("/health")
        if not metrics.is_success:
            check(metrics)
        try:
            return Look.read(at_s, metrics.text, check(load), health.json())
        except ValueError as error:
            if isinstance(error, MxnError):
                raise
            raise MxnError(f"{self.url} does not answer like an mxn server: {error}") from error

    def summaries(self, interval_s: float) -> Iterator[Summary | MxnError]:
        """Yield one summary for each interval, or why there is none: it may come back.

        Raises: MxnError when the server is not there in the beginning.
        """
        from mxn.cli.rates import summarize

        before = self.look()
        while True:
            time.sleep(interval_s)
            try:
                after = self.look()
            except MxnError as error:
                yield error
                continue
            yield summarize(self.url, before, after)
            before = after

    def close(self) -> None:
        self._http.close()


def _print(summary: Summary, as_json: bool) -> None:
    if as_json:
        import msgspec

        print(msgspec.json.encode(summary).decode(), flush=True)
        return
    from rich.console import Console

    # A file or a pipe has no width: names are for copying, so they are never cut there.
    Console(width=None if sys.stdout.isatty() else 160).print(draw(summary))


def _whole(found: Summary | MxnError) -> Summary:
    if isinstance(found, MxnError):
        raise found
    return found


def _show(summaries: Iterator[Summary | MxnError], url: str) -> None:
    from rich.live import Live
    from rich.text import Text

    with Live(Text(f"looking at {url} …"), screen=True, auto_refresh=False) as live:
        for found in summaries:
            view = Text(str(found)) if isinstance(found, MxnError) else draw(found)
            live.update(view, refresh=True)


def draw(summary: Summary) -> RenderableType:
    """Return the view of one interval: a headline, models, replicas."""
    from rich.console import Group
    from rich.text import Text

    parts = [
        f"{summary.url} {summary.state}",
        f"{summary.requests_per_s:.1f} requests/s",
        f"{summary.errors_per_s:.1f} errors/s",
        f"{summary.refused_per_s:.1f} refused/s",
        f"{summary.failovers} failovers",
    ]
    if summary.ledger_p95_s is not None:
        parts.append(f"ledger p95 {_time(summary.ledger_p95_s)}")
    if summary.cost_micro_per_min:
        parts.append(f"{_money(summary.cost_micro_per_min)}/min")
    head = Text(" · ".join(parts) + f"  (last {summary.seconds:.1f} s)")
    return Group(head, Text(), _models(summary.models), Text(), _replicas(summary))


def _models(models: list[ModelRates]) -> RenderableType:
    table = _table(
        ["model", "state"],
        ["req/s", "err/s", "in tok/s", "out tok/s", "run", "wait", "queue", "p50", "p95",
         "ttft p50", "ttft p95", "per minute"],
    )  # fmt: skip
    for m in models:
        seconds = (m.latency_p50_s, m.latency_p95_s, m.first_token_p50_s, m.first_token_p95_s)
        table.add_row(
            m.model,
            m.state,
            f"{m.requests_per_s:.1f}",
            f"{m.errors_per_s:.1f}",
            f"{m.input_tokens_per_s:.0f}",
            f"{m.output_tokens_per_s:.0f}",
            *map(str, (m.running, m.waiting, m.queued)),
            *map(_time, seconds),
            _money(m.cost_micro_per_min),
        )
    return table


def _replicas(summary: Summary) -> RenderableType:
    table = _table(["replica", "model", "chip", "state"], ["run", "wait", "kv", "tok/s", "lost"])
    for r in summary.replicas:
        table.add_row(
            r.replica,
            r.model,
            r.chip,
            r.state,
            str(r.running),
            "-" if r.waiting is None else str(r.waiting),
            "-" if r.kv_used is None else f"{100 * r.kv_used:.0f} %",
            f"{r.tokens_per_s:.0f}",
            str(r.lost),
        )
    return table


def _table(words: list[str], numbers: list[str]) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in words:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def _money(micro: dict[str, int]) -> str:
    """Return amounts such as ``0.0123 USD``."""
    return " + ".join(f"{m / 1e6:.4f} {name}" for name, m in sorted(micro.items())) or "-"
