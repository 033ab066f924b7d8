"""The stored table of one chip, with several processes that change it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from mxn.kernels.tune import Table


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("MXN_HOME", str(tmp_path))


def test_a_kernel_turned_off_by_another_process_stays_off_when_times_are_stored():
    loading, verifying = Table.open("chip"), Table.open("chip")
    verifying.judge({"linear/fast float32": "failed its parity test"})
    loading.store("linear 4x4", {"torch": {"M=1": 1.0}})
    after = Table.open("chip")
    assert after.off_reason("linear", "fast", "float32") == "failed its parity test"
    assert after.known("linear 4x4", {"torch"}) == {"torch": {"M=1": 1.0}}
    assert loading.off_reason("linear", "fast", "float32")


def test_a_kernel_that_passes_again_is_on_again():
    Table.open("chip").judge({"linear/fast float32": "failed"})
    Table.open("chip").judge({"linear/fast float32": None})
    assert Table.open("chip").off == {}


def test_forgetting_times_leaves_kernels_off():
    table = Table.open("chip")
    table.judge({"linear/fast float32": "failed"})
    table.store("linear 4x4", {"torch": {"M=1": 1.0}})
    table.forget()
    assert Table.open("chip").times == {}
    assert Table.open("chip").off == {"linear/fast float32": "failed"}


def test_many_writers_lose_nothing():
    tables = [Table.open("chip") for _ in range(24)]
    with ThreadPoolExecutor(8) as pool:
        jobs = enumerate(tables)
        list(pool.map(lambda job: job[1].store(f"k{job[0]}", {"torch": {"M=1": 1.0}}), jobs))
    assert len(Table.open("chip").times) == 24


def test_a_broken_file_is_measured_anew():
    table = Table.open("chip")
    table.store("linear 4x4", {"torch": {"M=1": 1.0}})
    table.path.write_text("{")
    assert Table.open("chip").times == {}
