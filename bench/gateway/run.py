"""mxn gateway and LiteLLM proxy in front of the same stub, in one run, interleaved.

mxn runs with keys, prices, a money budget, a token budget and its ledger on (SQLite, or PostgreSQL
with --database). LiteLLM runs as its documentation recommends for production, as many
workers as cores; without a database it keeps no accounts. For each number of connections: the stub
directly, mxn, LiteLLM, in each of several rounds; of each the round with the median rate counts,
and every answer is checked while it is measured.

    python bench/gateway/run.py --litellm /path/to/litellm --out bench/results/gateway.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from load import Result, measure
from stub import running_stub

from mxn.ledger import budget_admin, keys, tenants
from mxn.ledger.database import Database

START_S = 120.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def process(command: list[str], url: str, headers: dict[str, str], **env: str) -> Iterator[int]:
    """Run a server until the end of the block; begins when it answers a chat. Yields its pid."""
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | env)
        try:
            until_s = time.monotonic() + START_S
            while not _answers(url, headers):
                if child.poll() is not None or time.monotonic() > until_s:
                    log.seek(0)
                    raise SystemExit(f"{command[0]} is not up:\n{log.read()[-3000:].decode()}")
                time.sleep(0.3)
            yield child.pid
        finally:
            child.terminate()
            child.wait(30)


def _answers(url: str, headers: dict[str, str]) -> bool:
    body = {"model": "stub", "messages": [{"role": "user", "content": "#x#"}]}
    try:
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=5)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200


@contextlib.contextmanager
def mxn(stub: str, folder: Path, database: str | None, workers: int) -> Iterator[tuple[str, str]]:
    """Run the gateway with all accounting on; yield its URL and a key."""
    url = database or f"sqlite:///{folder}/ledger.db"
    opened = Database.open(url)
    with opened.begin() as connection:
        now = time.time_ns() // 1000
        project = tenants.ensure_default(connection, now_us=now)
        _, key = keys.create_key(connection, project, name=secrets.token_hex(4), now_us=now)
        org = tenants.Subject("org", tenants.find_project(connection, project).org_id)
        of_project = tenants.Subject("project", project)
        budget_admin.set_budget(
            connection, org, limit_amount=10**15, period="month", now_us=now, currency="USD"
        )
        budget_admin.set_budget(
            connection, of_project, limit_amount=10**15, period="day", now_us=now
        )
    opened.close()
    command = [sys.executable, "-m", "mxn.cli.main"]
    price = [*command, "price", "set", "stub", "--input", "0.1", "--output", "0.4"]
    subprocess.run([*price, "--database", url], check=True, stdout=subprocess.DEVNULL)
    port = free_port()
    gateway = [
        *command, "gateway", "--replica", f"stub={stub},chip=stub", "--port", str(port),
        "--database", url, "--workers", str(workers),
    ]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with process(gateway, address, {"authorization": f"Bearer {key}"}, MXN_HOME=str(folder)):
        yield address, key


@contextlib.contextmanager
def litellm(program: str, stub: str, folder: Path, workers: int) -> Iterator[tuple[str, str]]:
    """Run LiteLLM's proxy with its production settings; yield its URL and its master key."""
    key = f"sk-{secrets.token_hex(24)}"
    config = folder / "litellm.yaml"
    config.write_text(
        "model_list:\n"
        "  - model_name: stub\n"
        "    litellm_params:\n"
        f"      {{model: openai/stub, api_base: {stub}/v1, api_key: none}}\n"
        "litellm_settings: {request_timeout: 600, set_verbose: False, json_logs: true}\n"
        f"general_settings: {{master_key: {key}}}\n"
    )
    port = free_port()
    command = [
        program, "--config", str(config), "--port", str(port), "--host", "127.0.0.1",
        "--num_workers", str(workers),
    ]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    env = {
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    with process(command, address, {"authorization": f"Bearer {key}"}, **env):
        yield address, key


def one(name: str, target: tuple[str, str | None], kind: str, connections: int, seconds: float,
        chunks: int) -> Result:  # fmt: skip
    import uvloop

    url, key = target
    result = uvloop.run(
        measure(
            url,
            kind,
            model="stub",
            connections=connections,
            seconds=seconds,
            key=key,
            chunks=chunks,
        )
    )
    print(
        f"{kind:7} {connections:4} {name:8} {result.rate_per_s:10.1f}/s"
        f"  p50 {result.p50_ms:8.3f}  p99 {result.p99_ms:8.3f} ms  errors {result.errors}",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--litellm", help="the proxy's program; without it only mxn is measured")
    parser.add_argument("--database", help="of mxn; by default SQLite in a folder of its own")
    parser.add_argument("--workers", type=int, default=1, help="of mxn")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--kinds", nargs="+", default=["chat", "stream"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="for the stub and mxn")
    parser.add_argument("--peer-seconds", type=float, default=30.0)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stub = stack.enter_context(running_stub(chunks=options.chunks))
        targets: dict[str, tuple[str, str | None]] = {"stub": (stub, None)}
        targets["mxn"] = stack.enter_context(mxn(stub, folder, options.database, options.workers))
        if options.litellm:
            cores = os.cpu_count() or 1
            targets["litellm"] = stack.enter_context(litellm(options.litellm, stub, folder, cores))
        for kind in options.kinds:
            for connections in options.connections:
                found: dict[str, list[Result]] = {name: [] for name in targets}
                for _ in range(options.rounds):
                    for name, target in targets.items():
                        seconds = options.peer_seconds if name == "litellm" else options.seconds
                        found[name].append(
                            one(name, target, kind, connections, seconds, options.chunks)
                        )
                medians = {name: _median(results) for name, results in found.items()}
                rows.append(_row(kind, connections, medians))
    report = {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "workers": options.workers,
        "rounds": options.rounds,
        "database": "sqlite" if options.database is None else options.database.partition(":")[0],
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["rows"], indent=1) if not options.out else f"wrote {options.out}")


def _median(results: list[Result]) -> Result:
    return sorted(results, key=lambda result: result.rate_per_s)[(len(results) - 1) // 2]


def _row(kind: str, connections: int, found: dict[str, Result]) -> dict[str, Any]:
    own, direct, peer = found["mxn"], found["stub"], found.get("litellm")
    return {
        "kind": kind,
        "connections": connections,
        "added_p50_ms": round(own.p50_ms - direct.p50_ms, 3),
        "added_p99_ms": round(own.p99_ms - direct.p99_ms, 3),
        "share_of_direct": round(own.rate_per_s / direct.rate_per_s, 4),
        "times_peer": round(own.rate_per_s / peer.rate_per_s, 2) if peer else None,
        **{name: asdict(result) for name, result in found.items()},
    }


if __name__ == "__main__":
    main()
