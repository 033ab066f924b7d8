"""The leak finder of the replay finds leaks, and the trace is read as it is written."""

from __future__ import annotations

import mmap
import os
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "bench/gateway"
LINUX = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc")

TRACE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,14050,3"
)


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("azure", "samples", "leaks", "player", "load"):  # names others may want
        sys.modules.pop(name, None)


def test_growth_sees_a_slope_and_forgets_the_warm_up():
    from samples import growth

    at = [number / 10 for number in range(31)]
    assert growth(at, [100.0] * 31) == pytest.approx(0)
    assert growth(at, [100 + 7 * x for x in at]) == pytest.approx(7)
    warm = [5000 * min(x, 0.9) for x in at]
    assert growth(at, warm) == pytest.approx(0)
    with pytest.raises(ValueError, match="too few"):
        growth(at[:3], [1.0] * 3)


@LINUX
def test_what_a_process_holds_is_seen(tmp_path):
    from samples import sample

    before = sample(os.getpid())
    files = [(tmp_path / str(number)).open("w") for number in range(5)]
    memory = mmap.mmap(-1, 32 << 20)  # fresh pages: the heap may hold as many that are free
    memory.write(bytes(len(memory)))
    after = sample(os.getpid())
    assert after.num_files - before.num_files == 5
    assert after.num_sockets == before.num_sockets
    assert after.rss_kib - before.rss_kib > 16 << 10
    assert after.pss_kib - before.pss_kib > 16 << 10
    for file in files:
        file.close()
    memory.close()
    assert sample(os.getpid()).num_files == before.num_files


@LINUX
def test_what_is_kept_and_what_grows_is_told():
    from leaks import Sample, grown, kept
    from samples import sample

    held = sample(os.getpid())
    before = Sample(
        seconds=0, requests=0, rows=0, database_bytes=0, log_bytes=0, held={"gateway": held}
    )
    assert kept(before, before) == []
    more = replace(before, held={"gateway": replace(held, num_sockets=held.num_sockets + 1)})
    (problem,) = kept(before, more)
    assert "num_sockets" in problem
    assert grown({"gateway": 1000.0}, num_requests=100_000, limit_kib=1024.0) == []
    assert len(grown({"gateway": 1500.0}, num_requests=100_000, limit_kib=1024.0)) == 1
    assert grown({"gateway": 1500.0}, num_requests=1000, limit_kib=1024.0) == []


def test_the_trace_is_scaled_bounded_and_repeated(tmp_path):
    from azure import read_trace, timetable

    path = tmp_path / "trace.csv"
    path.write_text(TRACE, newline="")
    trace = read_trace(path, scale=0.1, longest=200)
    assert [(item.prompt_tokens, item.output_tokens) for item in trace] == [(37, 4), (200, 1)]
    assert [round(item.at_s, 3) for item in trace] == [0.0, 4.315]
    times = [item.at_s for item in islice(timetable(trace, None, None), 6)]
    assert times == sorted(times)
    assert len(list(timetable(trace, 5, None))) == 5
    assert all(item.at_s <= 36 for item in timetable(trace, None, 0.01))
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="columns"):
        read_trace(path, scale=1.0, longest=10)
