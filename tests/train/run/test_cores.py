"""Ranks that ask for cores of their own get them, or an error that says what is missing."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxn.errors import CapacityError
from mxn.train.run.cores import Wish, assign
from mxn.train.run.job import DeviceSettings
from mxn.train.run.launch import cores_of, start_process


def test_the_largest_shares_are_placed_first() -> None:
    wishes = [Wish(share=0.15), Wish(share=0.3), Wish(share=0.3), Wish(share=0.6)]
    found = assign(wishes, [0, 1])
    assert found == [{0}, {1}, {1}, {0}]


def test_several_threads_get_whole_cores() -> None:
    assert assign([Wish(share=0.5), None, Wish(threads=2)], [3, 5, 7]) == [{7}, None, {3, 5}]


@pytest.mark.parametrize(
    "wishes", [[Wish(threads=3)], [Wish(), Wish(), Wish()], [Wish(share=0.7)] * 3]
)
def test_what_does_not_fit_is_said(wishes: list[Wish]) -> None:
    with pytest.raises(CapacityError, match="wants"):
        assign(wishes, [0, 1])


@given(
    wishes=st.lists(
        st.builds(Wish, threads=st.integers(1, 3), share=st.floats(0.05, 1.0)), max_size=8
    ),
    num_cores=st.integers(1, 6),
)
def test_no_core_is_given_away_twice(wishes: list[Wish], num_cores: int) -> None:
    try:
        found = assign(wishes, range(num_cores))
    except CapacityError:
        return
    for core in range(num_cores):
        users = [w for w, cores in zip(wishes, found, strict=True) if cores and core in cores]
        assert sum(1.0 if w.threads > 1 else w.share for w in users) <= 1.0 + 1e-6
    for wish, cores in zip(wishes, found, strict=True):
        assert cores is not None
        assert len(cores) == wish.threads


def test_a_process_of_a_pinned_group_stays_there(tmp_path) -> None:
    group = DeviceSettings(name="a", device="cpu", pin=True)
    (cores,) = cores_of([group])
    assert cores is not None
    code = "import os, time; time.sleep(0.5); print(sorted(os.sched_getaffinity(0)))"
    process = start_process([sys.executable, "-c", code], tmp_path / "log", group)
    os.sched_setaffinity(process.pid, cores)
    assert process.wait(20) == 0
    assert (tmp_path / "log").read_text().strip() == str(sorted(cores))


def test_groups_that_do_not_ask_may_go_anywhere() -> None:
    assert cores_of([DeviceSettings(name="a", device="cpu")] * 9) == [None] * 9
