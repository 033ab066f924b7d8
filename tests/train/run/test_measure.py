"""Real measurements of the model that ships with mxn, in rank processes on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mxn.chips.chip import Device
from mxn.chips.sim.testing import sim
from mxn.errors import CapacityError, ConfigError
from mxn.train.plan.links import ring_s
from mxn.train.plan.memory import FLOAT32, MIXED, SAVED_BYTES
from mxn.train.run import cpu_share, measure, stored
from mxn.train.run.job import AdapterSettings, DeviceSettings, Job
from mxn.train.run.job_devices import JobDevices, members_of, pairs_of
from mxn.train.run.job_file import read_job
from mxn.train.run.job_model import look_at
from mxn.train.run.measure import Quality
from mxn.train.run.measured import chip_label
from mxn.train.run.prepare import task_of_job, with_devices
from mxn.train.run.session import make_plan
from support.forked_start import quickly

__all__ = ["sim"]

ROOT = Path(__file__).parents[3]
QUICK = Quality(blocks=3, block_s=0.02)
KINDS = {"embedding", "block", "head"}


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    """Two groups of a processor each, on a few lines of text."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "text.txt").write_text((ROOT / "recipes/data/tinyshakespeare.txt").read_text()[:4000])
    (folder / "job.yaml").write_text(
        "model: mxn-shakespeare-llama\n"
        "data: {files: [text.txt]}\n"
        "seq_tokens: 32\nmicro_batch: 1\nglobal_batch: 4\nsteps: 2\n"
        "devices:\n  - {name: a, device: cpu}\n  - {name: b, device: cpu, memory: 1GiB}\n"
    )
    return read_job(folder / "job.yaml", out=folder / "run")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MXN_HOME", str(tmp_path_factory.mktemp("home")))
        quickly(patch)
        yield


@pytest.fixture(scope="module")
def found(job):
    return measure.measure(job, quality=QUICK)


@pytest.fixture
def no_ranks(monkeypatch):
    """From here on nothing may be measured."""

    def refuse(*_):
        raise AssertionError("a rank was started")

    monkeypatch.setattr(measure, "ask_ranks", refuse)


def test_each_kind_of_layer_has_its_costs(found):
    (profile,) = found.profiles.values()  # two groups of one chip share it
    assert {kind for kind, _, _ in profile.costs} == KINDS
    block = profile.layer("block", 1, 1)
    # Orders of magnitude: the machine may be busy with other tests.
    assert 1e-5 < block.forward_s < 20 * block.backward_s < 20
    assert 0 <= block.weight_s <= block.backward_s
    assert block.optimizer_s > 0
    assert profile.basis == "measured"
    assert profile.layer("embedding", 1, 1).forward_s < block.forward_s * 5
    assert 50e6 < profile.framework_bytes < 2e9
    assert not found.is_reused


def test_widths_of_tensor_parallelism_are_measured_where_a_plan_has_them(job, monkeypatch):
    # Rows of their own: with the same ones it would replace what the other tests measured.
    wide = replace(job, seq_tokens=24, devices=(DeviceSettings(name="w", device="cpu", count=2),))
    found = measure.measure(wide, tps=(2,), quality=QUICK)
    (profile,), (kept,) = found.profiles.values(), found.stored.values()
    assert {(kind, tp) for kind, _, tp in profile.costs} == {
        (k, tp) for k in KINDS for tp in (1, 2)
    }
    reading = next(r for r in kept.readings if (r.kind, r.tp) == ("block", 2))
    (group,) = found.cluster.groups
    sums_s = 2 * ring_s(2, 4 * 24 * 192, group.node_link)  # float32 of 24 tokens of 192
    block = profile.layer("block", 1, 2)
    assert block.forward_s == pytest.approx(reading.cost.forward_s + sums_s)
    assert block.activation_bytes < profile.layer("block", 1, 1).activation_bytes
    monkeypatch.setattr(measure, "ask_ranks", None)  # from here on nothing is measured
    assert measure.measure(wide, tps=(2,)).is_reused
    alone = measure.measure(wide)
    assert alone.is_reused
    assert alone.profiles == found.profiles
    # A group in half the bytes sums half of them.
    narrow = replace(wide, devices=(replace(wide.devices[0], dtype="bfloat16"),))
    bench = measure._Bench(narrow, (1,), tps=(1, 2))
    label = bench.label(narrow.devices[0])
    told = bench.measured({label: replace(kept, chip=label)}, found.links, is_reused=True)
    half_s = 2 * ring_s(2, 2 * 24 * 192, group.node_link)
    assert told.profiles[label].layer("block", 1, 2).forward_s == pytest.approx(
        reading.cost.forward_s + half_s
    )


def test_with_time_given_it_is_measured_in_rounds_and_says_how_sure_it_is(job):
    found = measure.measure(replace(job, seq_tokens=20), quality=replace(QUICK, seconds=3.0))
    (kept,) = found.stored.values()
    assert all(reading.repeats >= 2 * 3 for reading in kept.readings)
    assert all(reading.error is not None for reading in kept.readings)
    # What is measured for another plan does not replace it by one round.
    more = measure.measure(replace(job, seq_tokens=20), micro_batches=(1, 2), quality=QUICK)
    (both,) = more.stored.values()
    assert {reading.micro_batch for reading in both.readings} == {1, 2}
    assert set(kept.readings) < set(both.readings)


def test_the_link_between_the_groups_is_measured(found):
    link = found.cluster.link("a", 0, "b", 0)
    assert link.basis == "measured"
    assert [size for size, _ in link.points] == sorted({size for size, _ in link.points})
    assert 0 < link.latency_s < link.transfer_s(1 << 24) < 5


def test_links_are_measured_in_the_bytes_that_go_over_them(job):
    """In float32 they went at half their size, so 16 bit was predicted twice as fast as it goes."""
    rate = 100e6
    slow = tuple(replace(group, link_bytes_per_s=rate) for group in job.devices)
    narrow = replace(job, devices=slow, plan=replace(job.plan, wire_dtype="bfloat16"))
    link = measure.measure(narrow, quality=QUICK).cluster.link("a", 0, "b", 0)
    assert link.float32_share == 0.5
    (_, early_s), (size, late_s) = link.points[-2:]
    assert late_s > early_s
    assert size / late_s < 1.1 * rate
    assert link.transfer_s(size, is_float32=True) == pytest.approx(late_s / 2, rel=0.3)


def test_the_cluster_has_the_groups_with_their_memory(found):
    a, b = found.cluster.groups
    assert (a.name, a.num_devices, b.memory_bytes) == ("a", 1, 1 << 30)
    assert a.memory_bytes > b.memory_bytes


def test_what_is_kept_for_backward_agrees_with_the_shape(found):
    (profile,) = found.profiles.values()
    for layer in found.shape.layers[1:]:
        measured = profile.layer(layer.kind, 1, 1).activation_bytes
        assert measured == pytest.approx(layer.activation_bytes * 32, rel=0.05)


def test_a_second_look_measures_nothing(job, found, no_ranks):
    again = measure.measure(job)
    assert again.is_reused
    assert again.profiles == found.profiles
    assert again.cluster == found.cluster


def test_watts_and_a_price_become_energy_and_cost(job, found, no_ranks):
    """They change nothing that is measured; a processor has none unless it is told."""
    assert all(group.watts is None for group in found.cluster.groups)
    told = tuple(replace(group, watts=65.0, price_per_hour=0.36) for group in job.devices)
    again = measure.measure(replace(job, devices=told))
    assert again.is_reused
    assert [(g.watts, g.price_micro_per_hour) for g in again.cluster.groups] == [(65, 360_000)] * 2
    best = task_of_job(replace(job, devices=told)).search().best
    step_s, num = best.prediction.iteration_s, best.plan.num_devices
    assert best.prediction.energy_j == pytest.approx(num * 65 * step_s)
    assert best.prediction.cost_micro == pytest.approx(num * 100 * step_s)


def test_a_group_with_a_dtype_of_its_own_keeps_what_that_takes(job, found, no_ranks):
    narrow = replace(job, devices=(job.devices[0], replace(job.devices[1], dtype="bfloat16")))
    bench = measure._Bench(narrow, (1,))
    (profile,) = found.profiles.values()
    own = bench._as_used(replace(profile, chip=bench.label(narrow.devices[1])))
    assert own.memory == replace(MIXED, saved_bytes=SAVED_BYTES)
    assert own.width == 0.5


def test_only_a_rank_on_the_processor_keeps_checkpoints_beside_its_own(job, found, no_ranks):
    """Its copies lay in memory that the planner took for free."""
    (profile,) = found.profiles.values()
    assert profile.memory == replace(FLOAT32, saved_bytes=SAVED_BYTES)
    assert profile.width == 1
    bench = measure._Bench(job, (1,))
    plain = replace(profile, memory=None)
    assert bench._as_used(plain) == profile
    for rank, device in bench.devices.by_rank.items():
        bench.devices.by_rank[rank] = replace(device, torch_device="npu:0")
    assert bench._as_used(plain) == replace(plain, overlaps_sums=True)


def test_the_planner_is_told_what_links_narrow_and_what_hides_sums(job, found, monkeypatch):
    (profile,) = found.profiles.values()
    assert profile.is_float32
    assert not profile.overlaps_sums  # sums take the processor's time
    bench = measure._Bench(replace(job, dtype="bfloat16"), (1,))
    assert not bench._as_used(profile).is_float32
    monkeypatch.setattr(JobDevices, "is_on_host", lambda *_: False)
    assert bench._as_used(profile).overlaps_sums


def test_other_conditions_are_measured_anew(job, found, no_ranks):
    for other in (
        replace(job, seq_tokens=16),
        replace(job, dtype="bfloat16"),
        replace(job, devices=(job.devices[0], DeviceSettings(name="b", device="cpu", threads=2))),
        replace(job, micro_batch=2),
    ):
        with pytest.raises(AssertionError, match="a rank was started"):
            measure.measure(other)
    with pytest.raises(AssertionError, match="a rank was started"):
        measure.measure(job, fresh=True)


def test_a_damaged_profile_stops_the_plan_and_is_named(job, found, no_ranks):
    (profile,) = found.stored.values()
    path = stored.layers_path(profile.key)
    whole = path.read_text()
    path.write_text(whole.replace('"forward_s": 0.', '"forward_s": 1.', 1))
    try:
        with pytest.raises(ConfigError, match="checksum") as error:
            make_plan(job, ("a", "b"))
        assert path.name in error.value.message
    finally:
        path.write_text(whole)


def test_a_plan_of_what_was_measured_covers_the_model_and_its_batch(job, found, no_ranks):
    plan = make_plan(job, ("a", "b"))
    plan.check()
    assert plan.num_layers == found.shape.num_layers == 6
    assert plan.micro_batches * plan.micro_batch == job.global_batch


def test_a_job_that_fits_nowhere_is_told_what_it_needs_and_what_is_there(job, found, no_ranks):
    tight = tuple(replace(group, memory_bytes=50 << 20) for group in job.devices)
    with pytest.raises(CapacityError, match="does not fit") as error:
        make_plan(replace(job, devices=tight), ("a", "b"))
    assert "1.8 M parameters" in error.value.message
    assert "group 'a': 1 x 50 MiB" in error.value.message


def test_ranks_and_links_follow_the_groups(job):
    devices = (
        DeviceSettings(name="g", device="cuda:2", count=2),
        DeviceSettings(name="c", device="cpu", count=2, threads=2, cpu_share=0.5),
        DeviceSettings(name="n", device="npu"),
    )
    mixed = replace(job, devices=devices)
    assert [(m.rank, m.group, m.device) for m in members_of(mixed)] == [
        (0, "g", "cuda:2"), (1, "g", "cuda:3"), (2, "c", "cpu:0"), (3, "c", "cpu:0"),
        (4, "n", "npu:0"),
    ]  # fmt: skip
    assert pairs_of(mixed) == [
        ("g", "g"), ("c", "c"), ("g", "c"), ("g", "n"), ("c", "n"),
    ]  # fmt: skip
    device = Device(
        id="cpu:0", chip="x86", vendor="cpu", torch_device="cpu", name="", memory_bytes=1
    )
    assert chip_label(mixed, devices[1], device) == "x86@0.5x2"
    other = replace(devices[2], dtype="bfloat16")
    assert chip_label(mixed, other, device) == "x86:bfloat16"


def test_a_job_without_devices_takes_those_of_this_machine(job):
    (group,) = with_devices(replace(job, devices=())).devices[:1]
    assert group.count >= 1
    assert with_devices(job) is job


def test_a_lora_job_trains_the_share_that_its_adapters_are(job):
    lora = replace(job, method="lora", lora=AdapterSettings(rank=2, alpha=4.0, targets=("q_proj",)))
    model, shape, _, share = look_at(lora)
    q = model.spec.layers[0].attention
    adapters = 4 * 2 * (model.spec.hidden + q.num_heads * q.head_dim)
    assert share == pytest.approx(adapters / shape.params)
    assert look_at(job)[3] == 1.0


@pytest.mark.sim
def test_a_profile_knows_the_simulated_ranks_that_took_time_of_its_processor(job, sim):
    """They were missing, so what was measured beside them was taken for what was measured alone."""
    cpu = DeviceSettings(name="a", device="cpu")
    both = replace(job, devices=(cpu, DeviceSettings(name="other", device="sim:0")))
    devices = JobDevices(both)
    labels = [devices.label(group) for group in both.devices]
    for group in both.devices:
        assert devices.company(group) == labels
    alone = replace(job, devices=(cpu,))
    keys = [measure._Bench(one, (1,))._layers_key(cpu) for one in (both, alone)]
    assert stored.fingerprint(keys[0]) != stored.fingerprint(keys[1])


@pytest.mark.sim
def test_two_makers_are_measured_together_and_the_simulated_one_says_so(job, sim):
    other = DeviceSettings(name="other", device="sim:0")
    found = measure.measure(replace(job, devices=(job.devices[0], other)), quality=QUICK)
    cpu, simulated = (found.profiles[group.chip] for group in found.cluster.groups)
    assert (cpu.basis, simulated.basis) == ("measured", "simulated")
    assert {kind for kind, _, _ in simulated.costs} == KINDS
    assert found.cluster.link("a", 0, "other", 0).basis == "simulated"


@pytest.mark.slow
@pytest.mark.skipif(cpu_share.why_not() is not None, reason=str(cpu_share.why_not()))
def test_a_share_of_the_processor_is_slower_and_simulated(job):
    slow = DeviceSettings(name="slow", device="cpu", cpu_share=0.1)
    mixed = replace(job, devices=(job.devices[0], slow))
    found = measure.measure(mixed, quality=Quality(blocks=3, block_s=0.1))
    fast, slow = (found.profiles[group.chip] for group in found.cluster.groups)
    assert slow.chip == f"{fast.chip}@0.1"
    assert (fast.basis, slow.basis) == ("measured", "simulated")
    ratio = slow.layer("block", 1, 1).forward_s / fast.layer("block", 1, 1).forward_s
    assert ratio > 2  # ten on an idle machine
    assert found.cluster.link("a", 0, "slow", 0).basis == "simulated"
