"""The simulated chip as a device: memory, faults, counters, and what a real chip would refuse."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch

from mxn.errors import ConfigError

pytestmark = pytest.mark.sim

MIB = 2**20


@pytest.fixture
def knobs(sim):
    from mxn.chips.sim import knobs

    return knobs


def _mixtures():
    """Every way to give an operator tensors of two devices: x on sim, y elsewhere, both [4, 4]."""
    return {
        "add": lambda x, y: x + y,
        "add in place": lambda x, y: y.add_(x),
        "matmul": lambda x, y: x @ y,
        "linear": lambda x, y: torch.nn.functional.linear(x, y),
        "cat": lambda x, y: torch.cat([x, y]),
        "where": lambda x, y: torch.where(x > 0, x, y),
        "mask": lambda x, y: x.masked_fill(y > 0, 0),
        "embedding": lambda x, y: torch.nn.functional.embedding(y.long(), x),
        "gather": lambda x, y: x.gather(0, y.long()),
        "scatter source": lambda x, y: x.scatter(0, x.long(), y),
        "index_copy": lambda x, y: x.index_copy(0, torch.arange(4, device=x.device), y),
        "index_put values": lambda x, y: x.index_put((torch.arange(4, device=x.device),), y),
        "indexed is not on sim": lambda x, y: y[x.long()],
        "out": lambda x, y: torch.mm(x, x, out=y),
        "sdpa": lambda x, y: torch.nn.functional.scaled_dot_product_attention(x, y, y),
    }


@pytest.mark.parametrize("other", ["cpu", "sim:1"])
@pytest.mark.parametrize("name", _mixtures())
def test_tensors_of_two_devices_are_refused(sim, name, other):
    x, y = torch.ones(4, 4, device=sim), torch.ones(4, 4, device=other)
    with pytest.raises(RuntimeError, match="same device"):
        _mixtures()[name](x, y)


def test_a_number_in_host_memory_is_let_pass(sim):
    x = torch.ones(2, device=sim)
    assert (x + torch.tensor(2.0)).tolist() == [3, 3]
    assert (torch.tensor(2.0) - x).device == sim
    assert torch.where(x > 0, torch.tensor(5.0), x).tolist() == [5, 5]


def test_a_number_in_host_memory_is_no_place_to_write_and_no_index(sim):
    x = torch.ones(2, device=sim)
    with pytest.raises(RuntimeError, match="same device"):
        torch.tensor(1.0).add_(x.sum())
    with pytest.raises(RuntimeError, match="same device"):
        x.index_select(0, torch.tensor(1))


def test_indexing_takes_host_indices_as_cuda_does(sim):
    x = torch.arange(4.0, device=sim)
    assert x[torch.tensor([3, 1])].tolist() == [3, 1]
    x[torch.tensor([0])] = torch.tensor(9.0)
    assert x.tolist() == [9, 1, 2, 3]


def test_numpy_is_refused(sim):
    with pytest.raises(TypeError, match="can't convert sim:0 device type tensor to numpy"):
        torch.ones(1, device=sim).numpy()


def test_generators_of_another_device_are_refused(sim):
    x = torch.ones(4, device=sim)
    for generator in (torch.Generator(), torch.Generator("sim:1")):
        with pytest.raises(RuntimeError, match="generator"):
            x.uniform_(generator=generator)


def test_an_operator_written_for_the_cpu_only_is_refused(sim):
    library = torch.library.Library("mxn_sim_test", "FRAGMENT")
    library.define("only_cpu(Tensor x) -> Tensor")
    library.impl("only_cpu", lambda x: x + 1, "CPU")
    assert torch.ops.mxn_sim_test.only_cpu(torch.ones(1)).item() == 2
    with pytest.raises(NotImplementedError, match="no kernel for device 'sim'"):
        torch.ops.mxn_sim_test.only_cpu(torch.ones(1, device=sim))


def test_a_device_that_does_not_exist_is_refused(sim):
    with pytest.raises(RuntimeError, match="invalid device ordinal 63"):
        torch.ones(1, device="sim:63")


def test_memory_returns_to_where_it_was(sim, knobs):
    gc.collect()
    before = knobs.bytes_now()
    x = torch.ones(256, 1024, device=sim, requires_grad=True)
    assert knobs.bytes_now() - before == MIB
    (x * x).sum().backward()
    assert knobs.bytes_now() - before == 2 * MIB + 0, "only x and its gradient should be left"
    assert knobs.bytes_peak() - before >= 3 * MIB
    del x
    gc.collect()
    assert knobs.bytes_now() == before


def test_each_device_has_its_own_memory(sim, knobs):
    before = knobs.bytes_now(0), knobs.bytes_now(1)
    x = torch.ones(1024, device="sim:1")
    y = x + x
    assert (knobs.bytes_now(0) - before[0], knobs.bytes_now(1) - before[1]) == (0, 8192)
    assert y.device == torch.device("sim:1")


def test_torch_accelerator_reads_the_memory(sim, knobs):
    x = torch.ones(MIB, device=sim)
    free, total = torch.accelerator.get_memory_info(0)
    assert total == knobs.current().memory_bytes
    assert total - free == torch.accelerator.memory_allocated(0) == knobs.bytes_now()
    assert knobs.bytes_now() >= x.nbytes


@pytest.mark.parametrize("make", ["empty", "result"])
def test_too_much_memory_is_an_out_of_memory_error(sim, knobs, make):
    x = torch.ones(MIB // 8, device=sim)
    before = knobs.bytes_now()
    with knobs.override(memory_bytes=before + MIB):
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            torch.empty(2 * MIB, device=sim) if make == "empty" else x.repeat(8).nonzero()
        gc.collect()
        assert knobs.bytes_now() == before
        assert (x + 1).sum().item() == MIB // 4, "the device must work on after it"


def test_poisoned_memory_shows_who_reads_before_writing(sim, knobs):
    with knobs.override(poison=True):
        assert torch.empty(8, device=sim).isnan().all()
        assert torch.empty(8, dtype=torch.int64, device=sim).eq(-1).all()
        assert torch.zeros(8, device=sim).eq(0).all()


def test_operators_are_counted_by_name(sim, knobs):
    x = torch.ones(2, 2, device=sim)
    knobs.reset_counters()
    x.view(4).view(2, 2).t()
    assert knobs.operators() == {}, "views launch nothing"
    (x @ x) @ x
    assert knobs.operators() == {"aten::mm": 2}


def test_copies_are_counted_by_direction(sim, knobs):
    x = torch.ones(10)
    knobs.reset_counters()
    y = x.to(sim)
    z = y.to("sim:1")
    z.cpu(), y.clone()
    assert knobs.copies() == {
        kind: knobs.CopyCount(1, 40) for kind in ("h2d", "d2h", "d2d", "on_device")
    }


def test_a_slow_launch_is_slow(sim, knobs):
    x = torch.ones(2, device=sim)
    with knobs.override(launch_us=3000):
        start = time.perf_counter()
        for _ in range(5):
            x.add_(1)
        elapsed = time.perf_counter() - start
    assert elapsed >= 0.015
    assert x.tolist() == [6, 6]


def test_a_slow_link_slows_copies_only(sim, knobs):
    x = torch.ones(250_000)
    with knobs.override(link_bytes_per_s=100e6):
        start = time.perf_counter()
        y = x.to(sim)
        assert time.perf_counter() - start >= 0.01
        start = time.thread_time()
        y.clone()
        assert time.thread_time() - start < 0.01


def test_the_nth_operator_fails_once(sim, knobs):
    x = torch.ones(2, device=sim)
    knobs.fail_after(3)
    x.add_(1).add_(1)
    with pytest.raises(torch.AcceleratorError, match=r"failure on sim:0 in operator aten::add "):
        x.add_(1)
    assert x.add_(1).tolist() == [4, 4]


def test_a_chip_that_is_gone_fails_until_healed(sim, knobs):
    x = torch.ones(2, device=sim)
    knobs.fail_after(1, forever=True)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="simulated chip failure"):
            x.add_(1)
    knobs.fail_after(0)
    assert x.add_(1).tolist() == [2, 2]


@pytest.mark.parametrize(
    "change", [{"launch_ms": 1}, {"launch_us": -1}, {"slow_factor": 0.5}, {"memory_bytes": -1}]
)
def test_impossible_knobs_are_refused(sim, knobs, change):
    before = knobs.current()
    with pytest.raises(ConfigError):
        knobs.set(**change)
    assert knobs.current() == before


def test_current_device_is_of_the_thread(sim):
    seen = []

    def work():
        torch.sim.set_device(1)
        seen.append(torch.ones(1, device="sim").device.index)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [1]
    assert torch.sim.current_device() == 0
    with torch.sim.device(1):
        assert torch.ones(1, device="sim").device.index == 1
    assert torch.accelerator.current_device_index() == 0


def test_threads_do_not_disturb_each_other(sim, knobs):
    gc.collect()
    before = [knobs.bytes_now(0), knobs.bytes_now(1)]
    knobs.reset_counters()
    sums = {}

    def work(index):
        torch.sim.set_device(index % 2)
        x = torch.full((64,), float(index), device="sim")
        for _ in range(200):
            x = x + 1
        sums[index] = x.sum().item()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == {i: 64.0 * (i + 200) for i in range(4)}
    assert knobs.operators()["aten::add"] == 800
    assert [knobs.bytes_now(0), knobs.bytes_now(1)] == before


def test_pinned_memory_knows_that_it_is_pinned(sim):
    x = torch.ones(4).pin_memory()
    assert x.device.type == "cpu"
    assert x[1:].is_pinned()
    assert not torch.ones(4).is_pinned()
    assert x.to(sim, non_blocking=True).tolist() == [1, 1, 1, 1]


def test_streams_and_events_order_and_time(sim, knobs):
    stream = torch.Stream(device=sim)
    default = torch.accelerator.current_stream()
    with stream:
        assert torch.accelerator.current_stream() == stream
    assert torch.accelerator.current_stream() == default
    start, end = (torch.Event(device=sim, enable_timing=True) for _ in range(2))
    with knobs.override(launch_us=2000):
        start.record()
        torch.ones(2, device=sim)
        end.record()
    torch.accelerator.synchronize()
    assert start.elapsed_time(end) >= 2


def test_it_is_the_accelerator_of_torch(sim):
    assert torch.accelerator.current_accelerator() == torch.device("sim")
    assert torch.accelerator.device_count() == torch.sim.device_count() >= 2
    assert torch.get_device_module("sim") is torch.sim
