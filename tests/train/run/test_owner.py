"""What killed processes leave behind is told from what is in use, and their helpers end too."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mxn.train.run import child, cpu_share, scratch
from mxn.train.run.owner import FORM, Owner
from mxn.train.run.supervise import status
from mxn.train.run.supervise.words import State


def wait_for(condition, timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def test_a_number_that_came_again_is_another_process():
    me = Owner.me()
    assert me.is_alive
    assert Owner.read(str(me)) == me
    assert Owner.in_name(f"x-{me}-abc.1.2", re.compile(rf"x-({FORM})-.+")) == me
    assert not Owner(me.pid, me.started - 1).is_alive
    assert Owner.read("812") is None
    assert Owner.read("qwen-0.6b") is None


def test_a_process_that_has_ended_and_is_not_waited_for_is_dead():
    process = subprocess.Popen([sys.executable, "-c", ""])
    try:
        wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
        assert not Owner(process.pid, started(process.pid)).is_alive
    finally:
        process.wait()


def started(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[19])


def test_status_is_not_deceived_by_a_number_that_came_again(tmp_path):
    path = tmp_path / "status.json"
    status.write(path, "j", State(groups=("a",), phase="running"), None)
    assert status.read(tmp_path).is_alive
    told = json.loads(path.read_text())
    assert told["pid"] == os.getpid()
    path.write_text(json.dumps(told | {"started": told["started"] - 1}))
    assert not status.read(tmp_path).is_alive
    del told["started"]  # of an earlier version
    path.write_text(json.dumps(told))
    assert not status.read(tmp_path).is_alive


def test_folders_of_dead_owners_are_removed_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = Owner(Owner.me().pid, Owner.me().started - 1)
    left = tmp_path / f"mxn-train-gate-{dead}-x1y2z3_4"
    left.mkdir()
    (left / "request.json").write_text("{}")
    locked = (
        tmp_path / f"mxn-train-ranks-{dead}-abcdefgh"
    )  # as an owner in another container has it
    locked.mkdir()
    with scratch.Folder("profile") as mine:
        assert Path(mine).parent == tmp_path
        assert Owner.in_name(Path(mine).name, scratch._NAME) == Owner.me()
        other = scratch.Folder("ranks")
        Path(other.name).rename(locked / "in")
        handle = os.open(locked, os.O_RDONLY)
        scratch.fcntl.flock(handle, scratch.fcntl.LOCK_SH)
        assert scratch.sweep(tmp_path) == [left]
        assert Path(mine).is_dir()
        assert locked.is_dir()
        os.close(handle)
        assert scratch.sweep(tmp_path) == [locked]


@pytest.mark.parametrize(
    "name",
    [
        "mxn-train-x",
        "mxn-train-qwen-0.6b",  # 0.6 is no process
        "mxn-train-llama-3.2",
        "mxn-train-run-{dead}-abcdefgh",
        "mxn-train-gate-{dead}",
        "mxn-train-ranks-{dead}-abcdefgh.kept",
        "my-mxn-train-ranks-{dead}-abcdefgh",
    ],
)
def test_what_a_user_gave_such_a_name_is_left(tmp_path, name):
    """An `out` in the folder of temporary files holds checkpoints, also of a job that runs."""
    me = Owner.me()
    folder = tmp_path / name.format(dead=Owner(me.pid, me.started - 1))
    (folder / "checkpoints").mkdir(parents=True)
    assert folder not in scratch.sweep(tmp_path)
    assert (folder / "checkpoints").is_dir()


def test_a_folder_that_another_sweep_removes_first_stops_no_job(tmp_path, monkeypatch):
    dead = Owner(Owner.me().pid, Owner.me().started - 1)
    left = tmp_path / f"mxn-train-ranks-{dead}-abcdefgh"
    left.mkdir()

    def is_alive(owner: Owner) -> bool:
        left.rmdir()  # by the other one, between the two looks
        return False

    monkeypatch.setattr(cpu_share, "sweep", list)
    monkeypatch.setattr(Owner, "is_alive", property(is_alive))
    assert left not in scratch.sweep(tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF, errno.ENOSYS])
def test_without_locks_jobs_start_and_nothing_is_removed(tmp_path, monkeypatch, number):
    """NFS takes a lock alone only on files open for writing; others take none."""
    left = tmp_path / f"mxn-train-ranks-{Owner(Owner.me().pid, Owner.me().started - 1)}-abcdefgh"
    left.mkdir()

    def flock(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(scratch.fcntl, "flock", flock)
    assert left not in scratch.sweep(tmp_path)
    assert left.is_dir()
    with scratch.Folder("gate") as mine:
        assert Path(mine).is_dir()
    assert not Path(mine).exists()


def test_cgroups_that_cannot_be_read_stop_no_sweep(tmp_path, monkeypatch):
    (tmp_path / "cgroup.controllers").write_text("cpu")
    monkeypatch.setattr(cpu_share, "_own_group", lambda root: root / "gone")
    assert cpu_share.sweep(tmp_path) == []
    assert "No such file" in (cpu_share.why_not(tmp_path) or "")


def test_cgroups_of_dead_owners_are_removed_once_they_are_empty(tmp_path):
    parent = tmp_path / "cpu"
    parent.mkdir()
    (parent / "cgroup.procs").touch()
    dead = Owner(Owner.me().pid, Owner.me().started - 1)
    empty, used, mine = (
        parent / f"mxn-{owner}-{n}-rank-0" for n, owner in enumerate((dead, dead, Owner.me()))
    )
    named = parent / "mxn-qwen-0.6b-0-x"  # somebody else's
    longer = parent / f"mxn-more-{dead}-0-rank-0"
    for folder in (empty, used, mine, named, longer):
        folder.mkdir()
    (used / "tasks").touch()  # a real one is busy while a process is in it
    assert cpu_share.sweep(tmp_path) == []  # too young
    assert cpu_share.sweep(tmp_path, older_s=0) == [empty]
    assert used.is_dir()
    assert all(folder.is_dir() for folder in (mine, named, longer))


STARTER = """
import subprocess, sys, time
from mxn.train.run import child
command = child.command("http.server", "--bind", "127.0.0.1", "0")
process = subprocess.Popen(command, stdout=2, start_new_session=True)
print(process.pid, flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("lives_s", [0.0, 60.0])
def test_a_helper_ends_with_who_started_it_however_early_that_is(lives_s):
    """A server that nobody asks stands for a measurement or a check that would go on for long."""
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(lives_s)], stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    if lives_s:
        time.sleep(0.5)
        assert psutil.pid_exists(pid)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


def test_every_helper_is_started_so(monkeypatch, tmp_path):
    from mxn.train.run import launch, measure_start, probe
    from mxn.train.run.gate import process as gate
    from mxn.train.run.job import DeviceSettings
    from support.launches import small_job

    seen: list[list[str]] = []

    class Started(Exception):
        pass

    def start(command, *_, **__):
        seen.append(command)
        raise Started

    group = DeviceSettings(name="a", device="cpu")
    job = small_job(tmp_path, 1, [group])
    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(measure_start, "start_process", start)
    for call in (
        lambda: gate.check_group(job, group),
        lambda: probe.start_probe(job, "a"),
        lambda: measure_start._start(0, group, tmp_path, "x"),
        lambda: start(launch.rank_command(tmp_path / "rank-0.json")),
    ):
        with pytest.raises(Started):
            call()
    begin = child.command("m")[:-1]
    assert [command[: len(begin)] for command in seen] == [begin] * 4


def test_what_an_export_on_another_machine_is_writing_is_left(tmp_path):
    """Its owner cannot be seen from here, its lock can."""
    from mxn.train.run.export import new_folder

    theirs = tmp_path / f".model.{Owner(Owner.me().pid, Owner.me().started - 1)}.part"
    theirs.mkdir()
    handle = scratch.lock(theirs)
    with new_folder(tmp_path / "model") as folder:
        assert theirs.is_dir()
        assert not scratch.is_unused(folder)
        (folder / "config.json").write_text("{}")
    os.close(handle)
    assert scratch.is_unused(tmp_path / "model")


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    from mxn.train.run.export import new_folder

    dead = tmp_path / f".model.{Owner(Owner.me().pid, Owner.me().started - 1)}.part"
    other = tmp_path / f".model.{Owner.me()}.other.part"
    longer = tmp_path / f".model.2.{Owner.me()}.part"  # of an export to `model.2`
    for folder in (dead, other, longer):
        folder.mkdir()
    with new_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
    assert {path.name for path in tmp_path.iterdir()} == {other.name, longer.name, "model"}
