"""What this machine can do at most in these very minutes: read bandwidth, int8 and fp32 peak.

Compiles `limits.c` at run time for the processor at hand. Knows no engine. Start at `measure`.

    python bench/engine/limits.py --threads 2
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("limits.c")
READ_MIB = 1024  # well over any last-level cache of a machine with few cores
COMPILER = ("gcc", "-O3", "-march=native", "-pthread", "-Wall")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """All threads together. `int8_tops` is None on a processor without AVX-512-VNNI."""

    threads: int
    read_gb_per_s: float
    int8_tops: float | None
    fp32_tflops: float


def measure(threads: int, seconds: float = 0.4, mib: int = READ_MIB) -> Limits:
    """Measure each limit for so many seconds. Raises: SystemExit without a C compiler."""
    command = [str(_program()), str(threads), str(mib), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    read, int8, fp32 = map(float, done.stdout.split())
    return Limits(threads=threads, read_gb_per_s=read, int8_tops=int8 or None, fp32_tflops=fp32)


def _program() -> Path:
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(COMPILER).encode()).hexdigest()[:12]
    program = Path(tempfile.gettempdir()) / f"mxn-limits-{digest}"
    if not program.is_file():
        partial = program.with_suffix(".partial")
        try:
            subprocess.run([*COMPILER, str(SOURCE), "-o", str(partial)], check=True, timeout=120)
        except FileNotFoundError:
            raise SystemExit(f"{COMPILER[0]} is not here; limits are measured with it") from None
        partial.rename(program)
    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = [asdict(measure(arguments.threads)) for _ in range(arguments.repeats)]
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    print(json.dumps({"schema": 1, "case": "limits", "basis": "measured", "rows": rows}))


if __name__ == "__main__":
    main()
