"""A checkpoint is whole or it is not there, and what is altered is found before it is used."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mxn.errors import MxnError, NotFoundError, UserError
from mxn.train.run.checkpoint import Checkpointer, Position, find, with_checkpoint
from mxn.train.run.checkpoint import manifest as manifests
from mxn.train.run.checkpoint import writer as writer_module
from mxn.train.run.checkpoint.files import write_json, write_tensors
from mxn.train.run.checkpoint.manifest import BrokenError
from mxn.train.run.checkpoint.stored import Stored, check_job
from mxn.train.run.checkpoint.writer import Identity, due, owned_layers

NUM_LAYERS = 3


def identity(num_ranks: int = 1, launch: int = 1) -> Identity:
    return Identity(
        job="j", plan="p", plan_json="{}", num_layers=NUM_LAYERS, num_ranks=num_ranks,
        launch=launch, told={"seq_tokens": 8},
    )  # fmt: skip


def layers(step: int, numbers=range(NUM_LAYERS)) -> dict[int, dict[str, torch.Tensor]]:
    return {
        number: {
            "weights/w": torch.full((3, 5), step + number / 10),
            "exp_avg/w": torch.arange(15.0).reshape(3, 5) * step,
        }
        for number in numbers
    }


def write(folder: Path, step: int, keep: int = 3, launch: int = 1) -> None:
    writer = Checkpointer(folder, rank=0, identity=identity(launch=launch), keep=keep)
    writer.save(Position(step=step, micro_batch=4 * step), layers(step))
    writer.close()


def test_what_was_saved_is_read_back_and_the_position_too(tmp_path):
    write(tmp_path, 7)
    stored = find(tmp_path, "newest")
    assert stored.manifest.position == Position(step=7, micro_batch=28)
    for number, wanted in layers(7).items():
        found = stored.layer(number)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 7).bfloat16(), torch.zeros(0, 4), torch.tensor(3.5),
        torch.arange(5), torch.tensor([True, False]), torch.randn(1000, 37).half(),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)  # fmt: skip
def test_our_files_are_safetensors_to_their_own_library(tmp_path, tensor):
    write_tensors(tmp_path / "x", {"before": torch.ones(3, dtype=torch.uint8), "x": tensor})
    found = load_file(tmp_path / "x")
    assert torch.equal(found["x"], tensor)
    assert found["x"].dtype == tensor.dtype


def test_changes_behind_save_are_not_in_the_checkpoint(tmp_path):
    held = layers(1)
    writer = Checkpointer(tmp_path, rank=0, identity=identity(), keep=1)
    writer.save(Position(step=1, micro_batch=1), held)
    for tensors in held.values():
        tensors["weights/w"].fill_(99)
    writer.close()
    assert find(tmp_path, "newest").layer(0)["weights/w"].max() == 1


def test_ranks_write_their_layers_and_any_rank_reads_any(tmp_path):
    holders = {0: [0, 1], 1: [0, 1], 2: [1]}
    owned = [owned_layers(holders, rank) for rank in range(2)]
    assert owned == [[0], [1, 2]]
    writers = [
        Checkpointer(tmp_path, rank=rank, identity=identity(num_ranks=2), keep=1)
        for rank in range(2)
    ]

    def save(rank: int) -> None:
        own = {"rng": torch.tensor([rank])}
        writers[rank].save(Position(step=5, micro_batch=0), layers(5, owned[rank]), own)
        writers[rank].close()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(save, (0, 1)))
    stored = find(tmp_path, "newest")
    assert [float(stored.layer(n)["weights/w"][0, 0]) for n in range(3)] == pytest.approx(
        [5.0, 5.1, 5.2]
    )
    assert stored.of_rank(1)["rng"] == 1
    assert stored.of_rank(2) == {}


def test_a_rank_that_cannot_write_spoils_one_checkpoint_and_no_step(tmp_path, monkeypatch):
    writers = [
        Checkpointer(tmp_path, rank=rank, identity=identity(num_ranks=2), keep=3)
        for rank in range(2)
    ]
    owned = {0: [0, 1], 1: [2]}

    def save(step: int) -> None:
        for rank in (1, 0):
            writers[rank].save(Position(step=step, micro_batch=0), layers(step, owned[rank]))

    bad = {2: {"weights/w": torch.zeros(3).to_sparse()}}  # a real failure of the writer
    monkeypatch.setattr(writers[1], "_copy", lambda layer, tensors, done: bad.get(layer, {}))
    save(1)
    with pytest.raises(MxnError, match="rank 1 could not write its part"):
        writers[0].close()
    assert find(tmp_path, "newest") is None
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    save(2)
    writers[0].close()
    assert find(tmp_path, "newest").manifest.position.step == 2
    assert writers[0].costs.num_failed == writers[0].costs.num_saved == 1


@pytest.mark.parametrize("full_for", [0, 1])
def test_a_full_disk_is_not_kept_full_by_what_could_be_written(tmp_path, monkeypatch, full_for):
    writers = [
        Checkpointer(tmp_path, rank=rank, identity=identity(num_ranks=2), keep=3, patience_s=5)
        for rank in range(2)
    ]
    other = 1 - full_for

    def write_until_full(path, tensors):
        if path.name.startswith("layer-00002") and path.name.endswith(
            f".{full_for:04d}.safetensors"
        ):
            path.write_bytes(b"what fitted")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_tensors(path, tensors)

    def piece_needs_room(path, content):
        if "error" in content and list(path.parent.glob(f"*.{full_for:04d}.safetensors")):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_json(path, content)

    monkeypatch.setattr(writer_module, "write_tensors", write_until_full)
    monkeypatch.setattr(writer_module, "write_json", piece_needs_room)
    owned = {full_for: [1, 2], other: [0]}
    for rank in (1, 0):
        writers[rank].save(Position(step=1, micro_batch=0), layers(1, owned[rank]))
    with pytest.raises(MxnError, match="No space left"):
        writers[full_for].close()
    with pytest.raises(MxnError, match=f"rank {full_for} could not write its part"):
        writers[0].close()
    assert list(tmp_path.iterdir()) == []


def test_a_layer_nobody_wrote_is_no_checkpoint(tmp_path):
    writer = Checkpointer(tmp_path, rank=0, identity=identity(), keep=1)
    writer.save(Position(step=1, micro_batch=0), layers(1, [0, 2]))
    with pytest.raises(MxnError, match="no rank wrote layer 1"):
        writer.close()
    assert find(tmp_path, "newest") is None


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        write(tmp_path, step, keep=2)
    assert [step for step, _ in manifests.complete(tmp_path)] == [15, 20]


def test_coming_by_a_step_again_replaces_its_checkpoint(tmp_path):
    write(tmp_path, 5, launch=1)
    write(tmp_path, 5, launch=2)
    find(tmp_path, "newest").verify()


# -- broken ones ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    write(folder, 5)
    return {path.name: path.read_bytes() for path in (folder / "step-00000005").iterdir()}


def lay_out(folder: Path, files: dict[str, bytes]) -> Path:
    target = folder / "step-00000005"
    target.mkdir(exist_ok=True)
    for name, data in files.items():
        (target / name).write_bytes(data)
    return target


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_flipped_bit_of_any_file_is_found(pristine, tmp_path, data):
    name = data.draw(st.sampled_from(sorted(pristine)))
    content = bytearray(pristine[name])
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    lay_out(tmp_path, pristine | {name: bytes(content)})
    with pytest.raises(UserError, match=f"step-00000005 is broken: {name}"):
        find(tmp_path, "newest")


@given(data=st.data())
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_file_cut_anywhere_is_found(pristine, tmp_path, data):
    name = data.draw(st.sampled_from(sorted(pristine)))
    end = data.draw(st.integers(0, len(pristine[name]) - 1))
    lay_out(tmp_path, pristine | {name: pristine[name][:end]})
    with pytest.raises(UserError, match=f"step-00000005 is broken: {name}"):
        find(tmp_path, "newest")


def test_a_missing_file_is_named(pristine, tmp_path):
    folder = lay_out(tmp_path, pristine)
    (folder / "layer-00001.0000.safetensors").unlink()
    with pytest.raises(UserError, match=r"layer-00001.0000.safetensors is missing"):
        find(tmp_path, "newest")


def test_a_reading_rank_checks_what_it_reads(pristine, tmp_path):
    folder = lay_out(tmp_path, pristine)
    stored = Stored.open(folder)
    path = folder / "layer-00001.0000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    stored.layer(0)
    with pytest.raises(BrokenError, match="does not have the checksum"):
        stored.layer(1)


def test_an_older_one_is_taken_only_when_asked_and_said(tmp_path, caplog):
    write(tmp_path, 5)
    write(tmp_path, 10)
    path = tmp_path / "step-00000010" / "layer-00002.0000.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="resume: intact") as caught:
        find(tmp_path, "newest")
    assert "layer-00002.0000.safetensors has" in caught.value.message
    stored = find(tmp_path, "intact")
    assert stored.manifest.position.step == 5
    assert "passed over and kept as broken-step-00000010-1" in caplog.text
    assert (tmp_path / "broken-step-00000010-1").is_dir()
    assert find(tmp_path, "newest").manifest.position.step == 5


def test_only_broken_ones_are_an_error_and_no_start_from_nothing(tmp_path):
    write(tmp_path, 5)
    (tmp_path / "step-00000005" / "layer-00000.0000.safetensors").unlink()
    with pytest.raises(UserError, match=r"no other checkpoint in .* is whole"):
        find(tmp_path, "intact")


def test_never_keeps_the_old_ones_out_of_the_way(tmp_path):
    write(tmp_path, 5)
    assert find(tmp_path, "never") is None
    assert find(tmp_path, "newest") is None
    assert (tmp_path / "before-1" / "step-00000005" / "manifest.json").is_file()


def test_another_job_does_not_go_on_from_it(tmp_path):
    write(tmp_path, 5)
    stored = find(tmp_path, "newest")
    check_job(stored, "j", {"seq_tokens": 8})
    with pytest.raises(UserError, match="seq_tokens: 8 then, 16 now"):
        check_job(stored, "k", {"seq_tokens": 16})


def test_due_by_steps_or_by_time():
    assert [due(step, 0, 3, None) for step in (1, 2, 3, 6)] == [False, False, True, True]
    assert [due(1, seconds, None, 10) for seconds in (9.9, 10)] == [False, True]
    assert not due(5, 1e9, None, None)


# -- kill -9 -------------------------------------------------------------------------------------

_WRITER = """
import sys, torch
from pathlib import Path
from mxn.train.run.checkpoint import Checkpointer, Position
from mxn.train.run.checkpoint.writer import Identity
who = Identity(job="j", plan="p", plan_json="{}", num_layers=3, num_ranks=1, launch=1)
writer = Checkpointer(Path(sys.argv[1]), rank=0, identity=who, keep=2)
layers = {n: {"weights/w": torch.zeros(300, 1000)} for n in range(3)}
step = 0
while True:
    step += 1
    for tensors in layers.values():
        tensors["weights/w"].fill_(step)
    writer.save(Position(step=step, micro_batch=step), layers)
    print(step, flush=True)
"""


def test_killed_while_writing_leaves_the_newest_whole(tmp_path):
    """The process writes without pause, so that whenever it dies it dies while it writes."""
    seen_partial = 0
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(folder)], stdout=subprocess.PIPE
        )
        try:
            for _ in range(3):
                process.stdout.readline()
            time.sleep(0.003 * attempt)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        said = int((process.stdout.read().split() or [b"3"])[-1])
        process.stdout.close()
        seen_partial += bool(manifests.partials(folder))
        stored = find(folder, "newest")
        step = stored.manifest.position.step
        assert step >= said - 2  # `save` waits for the write before: at most two are open
        assert all((stored.layer(n)["weights/w"] == step).all() for n in range(3))
        assert manifests.partials(folder) == []
    assert seen_partial


# -- reading while a job runs ----------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def test_a_checkpoint_that_is_read_is_not_removed_as_old(tmp_path):
    write(tmp_path, 1, keep=1)

    def read(stored: Stored) -> int:
        first = stored.layer(0)
        for step in (2, 3):
            write(tmp_path, step, keep=1)
        assert names(tmp_path) == ["step-00000001", "step-00000003"]
        assert torch.equal(stored.layer(0)["weights/w"], first["weights/w"])
        return stored.manifest.position.step

    assert with_checkpoint(tmp_path, None, read) == 1
    write(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step-00000004"]  # behind the reader it goes


def test_one_that_is_removed_all_the_same_is_read_again_from_the_newest(tmp_path, caplog):
    write(tmp_path, 1)
    tried = []

    def read(stored: Stored) -> int:
        tried.append(stored.manifest.position.step)
        if len(tried) == 1:
            write(tmp_path, 2)
            shutil.rmtree(stored.folder)  # as a user may
        stored.layer(2)
        return stored.manifest.position.step

    assert with_checkpoint(tmp_path, None, read) == 2
    assert tried == [1, 2]
    assert "step-00000001 was removed by the running job" in caplog.text


def test_a_step_that_was_asked_for_and_is_gone_is_said_with_those_there_are(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)

    def read(stored: Stored) -> None:
        shutil.rmtree(stored.folder)
        stored.layer(0)

    with pytest.raises(NotFoundError, match=r"of step 1[\s\S]*there are: 2; a running job"):
        with_checkpoint(tmp_path, 1, read)


def test_one_that_is_written_anew_while_it_is_read_is_read_again(tmp_path):
    write(tmp_path, 1)
    launches = iter((2, 3))

    def read(stored: Stored) -> int:
        if (launch := next(launches)) == 2:
            write(tmp_path, 1, launch=launch)
            assert names(tmp_path) == ["step-00000001", "step-00000001.partial-2000"]
            raise FileNotFoundError  # as of a file that the old one had and the new one has not
        return launch

    assert with_checkpoint(tmp_path, 1, read) == 3
    assert find(tmp_path, "newest") is not None
    assert names(tmp_path) == ["step-00000001"]


def test_a_broken_one_is_no_reason_to_try_another(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "step-00000002" / "layer-00001.0000.safetensors").write_bytes(b"x")
    with pytest.raises(BrokenError, match="layer-00001"):
        with_checkpoint(tmp_path, None, lambda stored: stored.layer(1))
