"""A rank's side of checkpoints: what rank 0 wishes, and that all obey alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mxn.errors import ChipError, UserError
from mxn.models.catalogue import shipped_models
from mxn.train.run.checkpoint import Stored, find
from mxn.train.run.control import Control, LastWords, ask, last_words
from mxn.train.run.job import CheckpointSettings, DataSettings, Job, ModelSettings
from mxn.train.run.keeper import GO_ON, SAVE, SAVE_AND_END, Keeper
from mxn.train.run.lora import LoraSettings, attach
from mxn.train.run.loss_scale import LossScale
from mxn.train.run.optim import AdamSettings, AdamW
from mxn.train.run.weights import ModelSource
from support.one_rank import one_stage_plan

FACTS = {"rows": "0123456789abcdef", "seed": 0}
NUM_LAYERS = 6


@pytest.fixture(scope="module")
def source():
    return ModelSource.open(shipped_models()["mxn-shakespeare-llama"], seq_tokens=16)


@pytest.fixture
def job(tmp_path):
    return Job(
        name="j", model=ModelSettings(source="m"), method="pretrain",
        data=DataSettings(files=("t",)), seq_tokens=16, micro_batch=1, global_batch=4, steps=9,
        epochs=None, devices=(), out=str(tmp_path),
        checkpoint=CheckpointSettings(folder=str(tmp_path / "c"), every_steps=3),
    )  # fmt: skip


def keeper(job, source, rank=0, layers=(0, NUM_LAYERS), facts=FACTS, num_ranks=1, holders=None):
    stage = source.stage(*layers)
    part = (stage, AdamW(stage, AdamSettings()))
    return Keeper(
        job, one_stage_plan(job, NUM_LAYERS, "a"), rank=rank, launch=1, parts=[part],
        holders=holders or {layer: [0] for layer in range(NUM_LAYERS)}, num_ranks=num_ranks,
        facts=facts,
    )  # fmt: skip


def trained(one: Keeper, updates: int) -> None:
    for _, optimizer in one.parts:
        optimizer.num_steps = updates


def test_rank_0_wishes_by_steps_by_time_and_when_it_is_asked(job, source):
    first = keeper(job, source)
    assert [first.wish(step) for step in range(6)] == [GO_ON, GO_ON, SAVE, GO_ON, GO_ON, SAVE]
    often = replace(job.checkpoint, every_steps=None, every_seconds=1e-9)
    assert keeper(replace(job, checkpoint=often), source).wish(0) == SAVE
    assert keeper(job, source, rank=1).wish(2) == GO_ON
    Control(first.writer.folder.parent, 1).ask_pause()
    assert first.wish(0) == SAVE_AND_END


def test_what_is_obeyed_is_on_the_disk_with_its_position(job, source):
    one = keeper(job, source)
    assert one.obey(GO_ON, 1, 10) is False
    assert one.obey(SAVE, 2, 10) is False
    assert one.obey(SAVE_AND_END, 3, 10) is True
    one.close()
    position = find(one.writer.folder, "newest").manifest.position
    assert (position.step, position.micro_batch, position.tokens) == (3, 12, 30)


def test_two_ranks_save_and_one_that_holds_all_goes_on(job, source):
    holders = {layer: [0] if layer < 2 else [1] for layer in range(NUM_LAYERS)}
    ranks = [
        keeper(job, source, rank, layers, num_ranks=2, holders=holders)
        for rank, layers in enumerate([(0, 2), (2, NUM_LAYERS)])
    ]
    with torch.no_grad():
        for stage, _ in (part for rank in ranks for part in rank.parts):
            for parameter in stage.parameters():
                parameter.add_(0.5)
    for rank in ranks:
        trained(rank, 3)
        rank.obey(SAVE, 3, 1)
    for rank in ranks:
        rank.close()
    whole = keeper(job, source)
    assert whole.resume(3).step == 3
    stage, optimizer = whole.parts[0]
    assert optimizer.num_steps == 3
    before = source.stage(0, NUM_LAYERS)
    for layer in range(NUM_LAYERS):
        want = before.layer_state(layer)
        for name, tensor in stage.layer_state(layer).items():
            assert torch.equal(tensor, want[name] + 0.5), name


def test_of_a_lora_job_only_adapters_are_kept_and_layers_without_one_are_empty(job, source):
    def with_adapters() -> Keeper:
        one = keeper(job, source)
        stage = one.parts[0][0]
        attach(stage, LoraSettings(rank=2, targets=("q_proj",)), seed=1)
        one.parts = ((stage, AdamW(stage, AdamSettings())),)
        return one

    one = with_adapters()
    trained = one.parts[0][0].layer_state(1, trainable_only=True)
    for tensor in trained.values():
        tensor.fill_(0.25)
    one.save(3)
    one.close()
    stored = find(one.writer.folder, "newest")
    assert stored.layer(0) == {}
    assert {name.split(".")[-3] for name in stored.layer(1)} == {"lora_A", "lora_B"}
    other = with_adapters()
    other.resume(3)
    found = other.parts[0][0].layer_state(1, trainable_only=True)
    assert found.keys() == trained.keys()
    assert all((tensor == 0.25).all() for tensor in found.values())


def test_other_data_is_another_job(job, source):
    one = keeper(job, source)
    one.obey(SAVE, 3, 1)
    one.close()
    other = keeper(job, source, facts=FACTS | {"rows": "f" * 16})
    with pytest.raises(UserError, match=r"another job \(rows: '0123456789abcdef' then"):
        other.resume(3)


def test_the_same_step_is_saved_once(job, source):
    one = keeper(job, source)
    one.save(3)
    one.save(3)
    one.close()
    assert one.writer.costs.num_saved == 1
    assert Stored.open(one.writer.folder / "step-00000003").manifest.num_ranks == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("no", hint="yes"), "user"),
        (ChipError("lost", device="sim:0"), "chip"),
        (RuntimeError("odd"), "other"),
        (ValueError(""), "other"),
    ],
    ids=repr,
)
def test_last_words_say_whose_fault_it_is(tmp_path, error, kind):
    control = Control(tmp_path, 2)
    assert control.words_of(0) is None
    control.leave_words(0, error)
    assert control.words_of(0).kind == kind
    assert last_words(error).message


def test_a_lost_peer_is_nobodys_fault():
    from mxn.errors import PeerError

    assert last_words(PeerError("rank 1 is gone", rank=1)) == LastWords(
        kind="peer", message="rank 1 is gone"
    )


def test_nobody_can_be_asked_where_no_job_runs(tmp_path):
    with pytest.raises(UserError, match="no job runs"):
        ask(tmp_path, "stop")


def saved_in_float16(job, source):
    """Return a keeper that has saved step 3 of a job that left one of three steps out."""
    first = keeper(job, source)
    first._loss_scale = LossScale(value=32.0, good_steps=7, is_on=True)
    trained(first, 2)
    first.save(3)
    first.close()
    return first


def test_the_factor_and_the_updates_are_in_the_checkpoint(job, source):
    first = saved_in_float16(job, source)
    position = find(first.writer.folder, "newest").manifest.position
    assert (position.updates, position.loss_scale, position.good_steps) == (2, 32.0, 7)
    again = keeper(job, source)
    again._loss_scale = LossScale(value=64.0, is_on=True)
    again.resume(3)
    assert again.parts[0][1].num_steps == 2
    assert (again._loss_scale.value, again._loss_scale.good_steps) == (32.0, 7)
    other = keeper(replace(job, dtype="float32"), source)  # of a plan without float16
    other.resume(3)
    assert other._loss_scale.value == 1


def test_steps_that_float16_left_out_stay_left_out_without_it(job, source):
    """The group with float16 was dropped, went on without, and came back."""
    saved_in_float16(job, source)
    without = keeper(job, source)
    without.resume(3)
    trained(without, 5)
    without.save(6)
    without.close()
    position = find(without.writer.folder, "newest").manifest.position
    assert (position.updates, position.loss_scale, position.good_steps) == (5, 32.0, 7)
    back = keeper(job, source)
    back._loss_scale = LossScale(value=64.0, is_on=True)
    back.resume(6)
    assert back.parts[0][1].num_steps == 5
    assert back._loss_scale.value == 32


def test_a_job_that_left_nothing_out_keeps_no_updates(job, source):
    one = keeper(job, source)
    trained(one, 3)
    one.save(3)
    one.close()
    position = find(one.writer.folder, "newest").manifest.position
    assert (position.updates, position.loss_scale) == (None, None)
