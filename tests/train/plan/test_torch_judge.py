"""torch's own pipelining judges the orders: it loads them, lowers them and runs them dry."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules
from torch.testing._internal.distributed.fake_pg import FakeStore

from mxn.train.plan.automatic import automatic_order
from mxn.train.plan.order_csv import from_csv, to_csv
from mxn.train.plan.schedules import order, split_backwards
from mxn.train.plan.times import Hop, PipelineTimes


@pytest.fixture
def world():
    """Return a function that makes a process group of so many ranks, of which this one is real."""

    def make(size):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)

    yield make
    dist.destroy_process_group()


def _runtime(num_stages, num_chunks, num_micro_batches):
    stages = [
        PipelineStage(
            torch.nn.Linear(2, 2), chunk * num_stages, num_stages * num_chunks, torch.device("cpu")
        )
        for chunk in range(num_chunks)
    ]
    return torch_schedules._PipelineScheduleRuntime(stages, num_micro_batches)


def _dry_run(runtime):
    """Return torch's dry run. It knows no shards and no sums of gradients."""
    unknown = {torch_schedules.UNSHARD, torch_schedules.RESHARD, torch_schedules.REDUCE_GRAD}
    kept = {
        rank: [action for action in row if action.computation_type not in unknown]
        for rank, row in runtime.pipeline_order_with_comms.items()
    }
    return torch_schedules._simulate_comms_compute(
        kept, lambda stage: runtime.stage_index_to_group_rank[stage], runtime._num_stages
    )


CASES = [
    ("gpipe", 3, 1, 4),
    ("1f1b", 2, 1, 2),
    ("1f1b", 4, 1, 10),
    ("interleaved", 4, 2, 8),
    ("interleaved", 3, 3, 7),
    ("interleaved", 4, 2, 3),
    ("zero-bubble", 4, 1, 9),
    ("zero-bubble", 3, 2, 7),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_loads_lowers_and_dry_runs_every_order(case, world, tmp_path):
    schedule, stages, chunks, batches = case
    world(stages)
    file = tmp_path / "order.csv"
    file.write_text(to_csv(order(schedule, stages, chunks, batches)))
    runtime = _runtime(stages, chunks, batches)
    runtime._load_csv(str(file))
    steps = _dry_run(runtime)
    done = [action for row in steps.values() for action in row if action and action.is_compute_op]
    per_pass = 3 if schedule == "zero-bubble" else 2
    assert len(done) == per_pass * stages * chunks * batches
    # What torch writes back, with its communication, is the same order.
    lowered = tmp_path / "lowered.csv"
    runtime._dump_csv(str(lowered), format="compute_comms")
    assert from_csv(lowered.read_text()) == order(schedule, stages, chunks, batches)


def test_torch_dry_runs_an_order_made_from_uneven_times(world, tmp_path):
    world(3)
    times = PipelineTimes(
        forward_s=((1.0,), (3.0,), (2.0,)),
        backward_s=((2.0,), (7.0,), (3.0,)),
        weight_s=((1.0,), (3.0,), (1.0,)),
        forward_hops=(Hop(0.5), Hop(2.0)),
        backward_hops=(Hop(0.5), Hop(2.0)),
    )
    file = tmp_path / "order.csv"
    file.write_text(to_csv(automatic_order(times, 8, [4, 3, 3], splits_weights=True)))
    runtime = _runtime(3, 1, 8)
    runtime._load_csv(str(file))
    assert len(_dry_run(runtime)) == 3


@pytest.mark.parametrize("batches", [4, 8, 10])
def test_the_interleaved_order_is_torchs_own(batches, world):
    world(4)
    stages = [
        PipelineStage(torch.nn.Linear(2, 2), chunk * 4, 8, torch.device("cpu"))
        for chunk in range(2)
    ]
    theirs = torch_schedules.ScheduleInterleaved1F1B(stages, batches, loss_fn=lambda a, b: a.sum())
    ours = from_csv(
        "\n".join(
            ",".join("" if action is None else str(action) for action in row)
            for row in theirs.pipeline_order.values()
        )
    )
    assert ours == order("interleaved", 4, 2, batches)


@pytest.mark.parametrize("batches", [4, 8, 12])
def test_the_zero_bubble_order_is_torchs_own(batches, world):
    world(4)
    stages = [PipelineStage(torch.nn.Linear(2, 2), 0, 4, torch.device("cpu"))]
    theirs = torch_schedules.ScheduleInterleavedZeroBubble(
        stages, batches, loss_fn=lambda a, b: a.sum()
    )
    ours = from_csv(
        "\n".join(
            ",".join("" if action is None else str(action) for action in row)
            for row in theirs.pipeline_order.values()
        )
    )
    assert ours == order("zero-bubble", 4, 1, batches)
    assert all(len(split_backwards(row)) == batches for row in ours)
