"""The gate finds the operator that a chip gets wrong, and lets chips pass that are right."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from mxn.chips.sim.testing import skip_reason
from mxn.models.catalogue import shipped_models
from mxn.train.plan.cluster import Cluster
from mxn.train.plan.plan import Chunk, Pipeline, Stage, TrainPlan
from mxn.train.plan.profile import ChipProfile, LayerCost
from mxn.train.plan.shape import LayerShape, ModelShape
from mxn.train.run import stored
from mxn.train.run.data.batch import MicroBatch
from mxn.train.run.gate.check import check_layers
from mxn.train.run.gate.optimizer import check_optimizer
from mxn.train.run.gate.process import Gate, is_mixed
from mxn.train.run.gate.record import record
from mxn.train.run.gate.speed import check_speed
from mxn.train.run.job_file import read_job
from mxn.train.run.job_model import memory_of
from mxn.train.run.measure import Measured
from mxn.train.run.stored import Reading, StoredProfile
from mxn.train.run.supervise.needs import GateError, SpeedError
from mxn.train.run.weights import ModelSource
from support import gate_cases
from support.forks import forkserver


@pytest.fixture(scope="module", params=["mxn-shakespeare-llama", "mxn-shakespeare-dsv3"])
def source(request):
    return ModelSource.open(shipped_models()[request.param], seq_tokens=32)


@pytest.fixture(scope="module")
def batch():
    random = torch.Generator().manual_seed(1)
    return MicroBatch.of_rows(torch.randint(0, 1000, (2, 32), generator=random))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cpu_is_right_in_its_dtypes(source, batch, dtype):
    findings = check_layers(source, batch, torch.device("cpu"), dtype)
    assert [str(f) for f in findings if f.problem] == []
    operators = {finding.operator.split("(")[0] for finding in findings}
    assert {"linear", "scaled_dot_product_attention", "silu", "cross_entropy"} <= operators
    tensors = {finding.tensor for finding in findings if not finding.operator}
    assert {"output", "gradient of its input"} <= tensors
    if dtype == torch.float32:
        assert max(finding.error for finding in findings) == 0  # the very same computation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cpu_steps_as_itself(source, dtype):
    findings = list(check_optimizer(source, torch.device("cpu"), dtype))
    assert [str(f) for f in findings if f.problem] == []
    whole = [finding for finding in findings if finding.operator == "AdamW.step"]
    assert len(whole) == 6  # a matrix and a vector: two moments and the update of each
    assert max(finding.error for finding in whole) == 0


def test_writes_are_recorded_only_where_they_are_asked_for():
    x = torch.ones(3)
    assert record(lambda: x.mul_(2)) == []
    (call,) = record(lambda: x.add_(1), in_place=True)
    assert call.name == "add_"
    assert call.args[0].tolist() == [2, 2, 2]  # as it was before


@pytest.mark.sim
@pytest.mark.parametrize("case", gate_cases.CASES, ids=lambda case: case.__name__)
def test_the_simulated_chip(case, tmp_path):
    """In a process of its own: autograd counts devices at the first backward pass of a process."""
    if reason := skip_reason():
        pytest.skip(reason)
    log = tmp_path / "log"
    process = forkserver().Process(target=gate_cases.run, args=(case.__name__, str(log)))
    process.start()
    process.join(280)
    assert process.exitcode == 0, log.read_text()[-3000:]


def test_views_and_casts_are_not_operators():
    x = torch.arange(6.0).reshape(2, 3).requires_grad_()
    calls = record(lambda: x.transpose(0, 1)[0].to(torch.float64).sum() + (x * 2).relu().sum())
    assert [call.name for call in calls] == ["sum", "mul", "relu", "sum", "add"]
    assert calls[1].args[0].requires_grad


def test_equal_calls_are_recorded_once():
    x = torch.ones(4)
    assert [str(call) for call in record(lambda: [x.exp() for _ in range(3)])] == ["exp([4])"]


# -- the job's gate -------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 40)
    path = tmp_path / "job.yaml"
    path.write_text("""
model: mxn-shakespeare-llama
data: {files: text.txt}
seq_tokens: 32
global_batch: 2
steps: 2
devices: [{name: a, device: cpu}, {name: b, device: "sim:0"}]
""")
    return read_job(path, out=tmp_path / "out")


def plan_of(job, *groups: str) -> TrainPlan:
    pipelines = tuple(
        Pipeline(
            stages=(Stage(group=group, first_device=0, chunks=(Chunk(first=0, end=6),)),),
            micro_batches=1,
        )
        for group in groups
    )
    return TrainPlan(model="m", num_layers=6, seq_tokens=32, micro_batch=1, pipelines=pipelines)


@pytest.mark.slow
@pytest.mark.sim
def test_a_process_checks_the_other_chip_once(job):
    if reason := skip_reason():
        pytest.skip(reason)
    said = []
    gate = Gate(on_say=said.append)
    gate(job, plan_of(job, "a", "b"))
    gate(job, plan_of(job, "a", "b"))
    assert len(said) == 1
    assert said[0].startswith("parity of sim:0 (simulated, float32): ")


@pytest.mark.slow
def test_a_gate_that_cannot_run_says_why(job):
    job = replace(job, devices=(job.devices[0], replace(job.devices[1], device="cuda:9")))
    with pytest.raises(GateError, match="no device 'cuda:9'"):
        Gate()(job, plan_of(job, "a", "b"))


def test_what_is_not_mixed_is_not_checked(job):
    job_of_cpus = replace(job, devices=(job.devices[0], replace(job.devices[0], name="b")))
    assert not is_mixed(job_of_cpus, job_of_cpus.devices)
    assert is_mixed(job, job.devices)
    halves = replace(job.devices[0], name="b", dtype="bfloat16")
    both = replace(job, devices=(job.devices[0], halves))
    assert is_mixed(both, both.devices)
    Gate(on_say=pytest.fail)(job_of_cpus, plan_of(job_of_cpus, "a", "b"))
    Gate(on_say=pytest.fail)(job, plan_of(job, "a"))  # the other chip is not in the plan


# -- speed ----------------------------------------------------------------------------------------


def measured(job, home, *, is_reused: bool, **seconds: float) -> Measured:
    """What was measured of chips whose layers take so many seconds, forward and backward each."""
    layer = LayerShape(
        kind="block", params=1, forward_flop=1.0, activation_bytes=1.0, output_bytes=1.0
    )
    kept = {}
    for chip, layer_s in seconds.items():
        cost = LayerCost(forward_s=layer_s, backward_s=layer_s, optimizer_s=0.0)
        reading = Reading(kind="block", micro_batch=1, tp=1, cost=cost, noise=0.0, repeats=3)
        kept[chip] = StoredProfile(
            chip=chip, key={"chip": chip}, readings=(reading,), framework_bytes=0.0,
            basis="measured",
        )  # fmt: skip
        stored.store_layers(kept[chip])
    profiles: dict[str, ChipProfile] = {c: kept[c].to_chip_profile() for c in kept}
    return Measured(
        shape=ModelShape(name="m", layers=(layer,) * 3, seq_tokens=32), cluster=Cluster(groups=()),
        profiles=profiles, stored=kept, links={}, memory=memory_of(job), is_reused=is_reused,
    )  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MXN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_chip_that_lies_is_named_and_its_true_profile_stays(job, home):
    planned = measured(job, home, is_reused=True, x=0.001, y=0.002)

    def again(told):
        assert [group.name for group in told.devices] == ["a", "b"]
        return measured(job, home, is_reused=False, x=0.0011, y=0.006)

    with pytest.raises(SpeedError, match=r"chip y is 3 times as slow as its profile says: 36 ms"):
        check_speed(job, ("a", "b"), planned, again)
    kept = {chip: stored.load_layers({"chip": chip}).readings[0].cost.forward_s for chip in "xy"}
    assert kept == {"x": 0.001, "y": 0.006}  # x was measured for longer then


def test_within_the_tolerance_nothing_is_said(job, home):
    planned = measured(job, home, is_reused=True, x=0.001)
    check_speed(job, ("a",), planned, lambda told: measured(job, home, is_reused=False, x=0.00119))
    with pytest.raises(SpeedError, match="as fast"):
        check_speed(
            job, ("a",), planned, lambda told: measured(job, home, is_reused=False, x=0.0005)
        )


def test_what_was_just_measured_is_not_measured_again(job, home):
    planned = measured(job, home, is_reused=False, x=0.001)
    check_speed(job, ("a",), planned, lambda told: pytest.fail("measured again"))


@pytest.mark.slow
def test_a_device_that_answers_is_told_from_one_that_does_not(job):
    from mxn.train.run.probe import start_probe

    job = replace(job, devices=(job.devices[0], replace(job.devices[1], device="cuda:9")))
    probes = [start_probe(job, "a"), start_probe(job, "b")]
    while None in [probe.answer() for probe in probes]:
        time.sleep(0.05)
    assert [probe.answer() for probe in probes] == [True, False]


def test_a_group_is_probed_on_all_its_devices(job, monkeypatch):
    from mxn.train.run import probe

    asked: list[list[str]] = []
    monkeypatch.setattr(probe, "DeviceProbe", asked.append)
    two = replace(job.devices[1], device="cuda:1", count=2)
    many = replace(job.devices[0], device="cpu", count=3)
    job = replace(job, devices=(many, two))
    for group in job.devices:
        probe.start_probe(job, group.name)
    assert asked == [["cpu"], ["cuda:1", "cuda:2"]]


@pytest.mark.slow
def test_a_group_with_one_device_of_two_does_not_answer(job):
    from mxn.train.run.probe import DeviceProbe

    probe = DeviceProbe(["cpu", "cuda:9"])
    while probe.answer() is None:
        time.sleep(0.05)
    assert probe.answer() is False
