"""Which plan files are none for a job, and what `devices: auto` stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mxn.chips.chip import Device
from mxn.errors import UserError
from mxn.train.plan.cluster import Cluster, DeviceGroup, Link
from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.plan.profile import ChipProfile, LayerCost
from mxn.train.run.job_devices import groups_of, members_of
from mxn.train.run.job_file import read_job
from mxn.train.run.job_model import look_at, memory_of
from mxn.train.run.prepare import Task, limits_of, plan_of_job

ROOT = Path(__file__).parents[3]


@pytest.fixture
def job(tmp_path):
    folder = tmp_path
    (folder / "text.txt").write_text((ROOT / "recipes/data/tinyshakespeare.txt").read_text()[:4000])
    (folder / "job.yaml").write_text(
        "model: mxn-shakespeare-llama\n"
        "data: {files: [text.txt]}\n"
        "seq_tokens: 32\nmicro_batch: 1\nglobal_batch: 4\nsteps: 2\n"
        "devices:\n  - {name: a, device: cpu}\n"
    )
    return read_job(folder / "job.yaml", out=folder / "run")


def test_a_plan_file_in_other_micro_batches_is_refused(job, tmp_path):
    """Data comes in the job's: ranks would wait for messages of another size."""
    shape = look_at(job)[1]
    costs = {
        (layer.kind, rows, 1): LayerCost(forward_s=1.0, backward_s=2.0, optimizer_s=0.1)
        for layer in shape.layers
        for rows in (1, 2)
    }
    link = Link(latency_s=0.0, bytes_per_s=1e9)
    group = DeviceGroup(
        name="a", chip="a", num_devices=1, devices_per_node=1, memory_bytes=10**9,
        node_link=link, group_link=link,
    )  # fmt: skip
    task = Task(
        shape=shape, rows=4, cluster=Cluster(groups=(group,)),
        profiles={"a": ChipProfile(chip="a", costs=costs)}, memory=memory_of(job),
        limits=limits_of(job),
    )  # fmt: skip
    stage = Stage(group="a", first_device=0, chunks=(Chunk(first=0, end=shape.num_layers),))
    for rows in (1, 2):
        plan = TrainPlan(
            model=shape.name, num_layers=shape.num_layers, seq_tokens=32, micro_batch=rows,
            pipelines=(Pipeline(stages=(stage,), micro_batches=4 // rows),),
        )  # fmt: skip
        (tmp_path / "plan.json").write_text(plan.to_json())
        given = replace(job, plan=replace(job.plan, file=str(tmp_path / "plan.json")))
        if rows == job.micro_batch:
            assert plan_of_job(given, task)[0] == plan
            continue
        with pytest.raises(UserError, match="in micro-batches of 2"):
            plan_of_job(given, task)


@pytest.fixture
def pool():
    """Return a job's task: two chips, of which the second is half as quick, and a link."""

    def make(job, *, memory_bytes: int, open_share: float = 0.0) -> Task:
        shape = look_at(job)[1]
        profiles = {
            name: ChipProfile(
                chip=name,
                costs={
                    (layer.kind, 1, 1): LayerCost(
                        forward_s=each_s, backward_s=2 * each_s, optimizer_s=0.3 * each_s
                    )
                    for layer in shape.layers
                },
            )
            for name, each_s in (("a", 1.0), ("b", 2.0))
        }
        link = Link(latency_s=0.0, bytes_per_s=1e9)
        groups = tuple(
            DeviceGroup(
                name=name, chip=name, num_devices=1, devices_per_node=1, memory_bytes=memory_bytes,
                node_link=link, group_link=link,
            )
            for name in profiles
        )  # fmt: skip
        return Task(
            shape=shape, rows=8, cluster=Cluster(groups=groups, links={("a", "b"): link}),
            profiles=profiles, memory=memory_of(job), limits=limits_of(job), open_share=open_share,
        )  # fmt: skip

    return make


def depths(task: Task) -> list[int]:
    return [len(pipeline.stages) for pipeline in task.search().best.plan.pipelines]


def test_open_micro_batches_want_pipelines_of_one_rank(job, pool):
    """With eight rows one pipeline is quicker by a little, and open ones save what it waits."""
    assert depths(pool(job, memory_bytes=10**10)) == [2]
    assert depths(pool(job, memory_bytes=10**10, open_share=0.25)) == [1, 1]


def test_where_no_chip_holds_the_model_open_micro_batches_are_left_out(job, pool, caplog):
    task = pool(job, memory_bytes=10**10, open_share=0.25)
    whole = max(stage.memory_bytes for stage in task.search().best.prediction.stages)
    tight = pool(job, memory_bytes=int(0.7 * whole), open_share=0.25)
    assert depths(tight) == [2]
    assert "no chip holds the whole model" in caplog.text


def test_open_micro_batches_are_predicted_where_they_will_be_done(job, pool):
    """Of even counts the slow chip keeps three of four, and the quick one does the other."""
    task = pool(job, memory_bytes=10**10)
    whole = (Chunk(first=0, end=task.shape.num_layers),)
    plan = TrainPlan(
        model=task.shape.name, num_layers=task.shape.num_layers, seq_tokens=32, micro_batch=1,
        pipelines=tuple(
            Pipeline(
                stages=(Stage(group=name, first_device=0, chunks=whole),), micro_batches=4
            )
            for name in ("a", "b")
        ),
    )  # fmt: skip
    fixed, opened = task.predict(plan), replace(task, open_share=0.25).predict(plan)
    each_s = 3.0 * 2 * task.shape.num_layers  # of the slow chip
    assert fixed.iteration_s - opened.iteration_s == pytest.approx(each_s)
    moved = [stage.busy_s for stage in opened.stages]
    assert moved[0] / moved[1] == pytest.approx(5 / (2 * 3))


def test_where_one_chip_alone_holds_the_model_open_micro_batches_are_left_out(job, pool, caplog):
    """The planner dropped the other chip for them, and nothing was open."""
    task = pool(job, memory_bytes=10**10, open_share=0.25)
    whole = max(stage.memory_bytes for stage in task.search().best.prediction.stages)
    a, b = task.cluster.groups
    groups = (a, replace(b, memory_bytes=int(0.7 * whole)))
    tight = replace(task, cluster=replace(task.cluster, groups=groups))
    assert depths(tight) == [2]
    assert "no two chips hold the whole model" in caplog.text


def device(kind: str, number: int, chip: str) -> Device:
    name = f"{kind}:{number}"
    return Device(
        id=name, chip=chip, vendor=chip, torch_device=name, name=chip, memory_bytes=10**9
    )  # fmt: skip


@pytest.mark.parametrize(
    ("chips", "groups"),
    [
        ("AAA", [("A", "cuda:0", 3)]),
        ("AB", [("A", "cuda:0", 1), ("B", "cuda:1", 1)]),
        ("ABA", [("A", "cuda:0", 1), ("A-2", "cuda:2", 1), ("B", "cuda:1", 1)]),
        ("AABBA", [("A", "cuda:0", 2), ("A-4", "cuda:4", 1), ("B", "cuda:2", 2)]),
    ],
)
def test_devices_auto_takes_each_device_once_where_chips_take_turns(job, chips, groups):
    found = groups_of([device("cuda", number, chip) for number, chip in enumerate(chips)])
    assert [(group.name, group.device, group.count) for group in found] == groups
    ranks = members_of(replace(job, devices=found))
    assert sorted(rank.device for rank in ranks) == [f"cuda:{n}" for n in range(len(chips))]


def test_devices_auto_does_not_count_on_over_a_missing_number_or_another_type():
    found = groups_of([device("cuda", 0, "A"), device("cuda", 2, "A"), device("npu", 3, "A")])
    assert [(group.device, group.count) for group in found] == [
        ("cuda:0", 1), ("cuda:2", 1), ("npu:3", 1),
    ]  # fmt: skip
