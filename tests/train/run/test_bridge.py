"""Messages and sums between real processes, also between two makers (CPU and simulated chip)."""

from __future__ import annotations

import socket

import pytest

from mxn.chips.sim.testing import skip_reason
from support.ranks import run_ranks

MIXED = ["cpu", "sim:0", "sim:1", "cpu"]
CASES = "support.bridge_cases"

needs_sim = pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))


@needs_sim
@pytest.mark.parametrize("shape", [[3], [0, 4], [1024, 1031]], ids=str)
def test_every_rank_gets_what_every_other_rank_sent(shape):
    assert run_ranks(f"{CASES}:everybody", MIXED, {"shape": shape}) == [[0.0] * 3] * 4


@needs_sim
@pytest.mark.parametrize("dtype", ["bfloat16", "int64"])
def test_other_dtypes_arrive_unchanged(dtype):
    got = run_ranks(f"{CASES}:everybody", MIXED[:2], {"shape": [7, 5], "dtype": dtype})
    assert got == [[0.0], [0.0]]


@needs_sim
def test_bf16_on_the_wire_rounds_only_between_makers():
    options = {"wire_dtype": "bfloat16"}
    devices = ["cpu", "sim:0", "cpu"]
    got = run_ranks(f"{CASES}:everybody", devices, {"shape": [500]}, options=options)
    (to_sim, to_cpu), (*from_cpus,), _ = got
    assert to_cpu == 0.0  # from the other CPU
    assert 0.0 < to_sim < 100 * 4 * 2**-8
    assert all(0.0 < error < 100 * 4 * 2**-8 for error in from_cpus)


@needs_sim
@pytest.mark.parametrize("devices", [["cpu", "cpu"], ["cpu", "sim:0"], ["sim:0", "sim:1"]], ids=str)
def test_messages_are_matched_by_tag_not_by_order(devices):
    assert run_ranks(f"{CASES}:two_tags", devices) == [[1.0, 2.0]] * 2


@needs_sim
def test_sums_over_subsets_agree_bitwise_on_all_their_ranks_and_in_every_run():
    sets = [[0, 1, 2, 3], [0, 3], [1, 2], [0, 2], [1]]
    arguments = {"sets": sets, "size": 1031, "rounds": 2}
    first = run_ranks(f"{CASES}:sums", MIXED, arguments)
    again = run_ranks(f"{CASES}:sums", MIXED, arguments)
    assert first == again
    for ranks in sets:
        for number in range(2):
            found = [first[rank][f"{ranks} {number}"] for rank in ranks]
            assert len({one["bits"] for one in found}) == 1
            assert found[0]["error"] < 1e-5


@needs_sim
@pytest.mark.parametrize("size", [1, 2, 700_001])
def test_a_sum_over_three_makers_with_bf16_on_the_wire_stays_in_step(size):
    got = run_ranks(
        f"{CASES}:sums",
        ["cpu", "sim:0", "cpu", "cpu"],
        {"sets": [[0, 1, 2, 3]], "size": size},
        islands=["a", None, "b", "b"],
        options={"wire_dtype": "bfloat16"},
    )
    found = [one["[0, 1, 2, 3] 0"] for one in got]
    assert len({one["bits"] for one in found}) == 1
    assert found[0]["error"] < 0.1


def test_every_rank_sees_the_numbers_of_every_rank():
    assert run_ranks(f"{CASES}:gathered", ["cpu"] * 3) == [[[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]]] * 3


@needs_sim
@pytest.mark.parametrize("devices", [["cpu", "cpu"], ["sim:0", "cpu"]], ids=str)
def test_a_timeout_names_the_peer_and_what_was_waited_for(devices):
    options = {"timeout_s": 1.0}
    error = run_ranks(f"{CASES}:never_sent", devices, options=options)[0]
    assert f"rank 1 ({devices[1]}" in error["text"]
    assert "activations of micro-batch 7" in error["text"]
    assert error["rank"] == 1
    assert 0.9 < error["s"] < 3


@needs_sim
@pytest.mark.parametrize("devices", [["cpu", "cpu"], ["sim:0", "cpu"]], ids=str)
def test_the_death_of_a_peer_is_noticed_long_before_the_timeout(devices):
    error = run_ranks(f"{CASES}:dies", devices, options={"timeout_s": 60.0})[0]
    assert "gradients of micro-batch 2" in error["text"]
    assert error["rank"] == 1
    assert error["s"] < 5


@needs_sim
def test_a_link_limit_slows_messages_between_islands_and_bytes_are_counted():
    limit = {"bytes_per_s": 8e6, "latency_s": 0.02}
    arguments = {"num_bytes": 400_000, "count": 4}
    for devices in (["cpu", "sim:0"], ["sim:0", "cpu"]):
        sender, receiver = run_ranks(f"{CASES}:timed", devices, arguments, options={"limit": limit})
        assert receiver["s"] == pytest.approx(4 * (0.05 + 0.02), rel=0.3)
        assert sender["sent"] == receiver["received"] == 5 * 400_000


def test_the_store_listens_on_its_own_address_only():
    from mxn.train.run.bridge import open_store, serve_store

    store, address = serve_store()
    port = int(address.rpartition(":")[2])
    open_store(address, timeout_s=10).set("who", "a rank")
    assert store.get("who") == b"a rank"
    with pytest.raises(ConnectionRefusedError):  # 127.0.0.2 is this machine too
        socket.create_connection(("127.0.0.2", port), timeout=5)
