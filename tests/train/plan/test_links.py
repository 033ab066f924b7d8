"""What messages and sums cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxn.errors import UserError
from mxn.train.plan.cluster import Cluster, DeviceGroup, Link
from mxn.train.plan.links import quadratic_link, ring_link, ring_s, slowest
from mxn.train.plan.plan import Chunk, Stage
from mxn.train.plan.reduction import sum_s

FAST = Link(latency_s=0.0, bytes_per_s=100e9)
SLOW = Link(latency_s=0.0, bytes_per_s=1e9)
GH200 = ((-0.16570216, 2.79431173, 11.74409677), 22.9e9)  # Sailor, between nodes


def stage(group, first_device):
    return Stage(group=group, first_device=first_device, chunks=(Chunk(first=0, end=1),))


def group(name, inner, outer):
    return DeviceGroup(
        name=name,
        chip=name,
        num_devices=8,
        devices_per_node=4,
        memory_bytes=10**9,
        node_link=inner,
        group_link=outer,
    )


def test_a_ring_moves_each_part_there_and_back():
    assert ring_s(4, 4e9, SLOW) == pytest.approx(2 * 3 * 1.0)
    assert ring_s(1, 4e9, SLOW) == 0.0
    assert ring_s(4, 0, SLOW) == 0.0


def test_a_fit_is_followed_between_its_ends():
    link = quadratic_link(*GH200, latency_s=2e-5)
    assert 2**24 / link.transfer_s(2**24) == pytest.approx(20.37e9, rel=1e-3)


@given(st.floats(1, 1e11), st.floats(1, 4))
def test_no_message_on_a_fitted_link_takes_longer_than_a_larger_one(size, times):
    """Quadratic fits are negative for small messages and bend down for large ones."""
    link = quadratic_link(*GH200, latency_s=2e-5)
    assert 2e-5 <= link.transfer_s(size) <= link.transfer_s(size * times) * (1 + 1e-12)
    assert size / link.transfer_s(size) <= 22.9e9 * 1.001


def test_a_fit_without_a_plateau_is_refused():
    with pytest.raises(UserError, match="plateau"):
        quadratic_link((0, 0, 1), 0.0, latency_s=0)


def test_a_link_made_of_measured_sums_gives_them_back():
    sums = [(1e6, 44e-6), (2e6, 53e-6), (4e6, 61e-6)]
    link = ring_link(4, sums, "measured")
    for size, seconds in sums:
        assert ring_s(4, size, link) == pytest.approx(seconds)
    with pytest.raises(UserError):
        ring_link(1, sums, "measured")


def test_the_slowest_link_depends_on_the_message():
    near, far = Link(latency_s=1e-3, bytes_per_s=1e12), Link(latency_s=0, bytes_per_s=1e9)
    assert slowest([near, far], 1e3) is near
    assert slowest([near, far], 1e9) is far
    assert slowest([], 1.0) is None


def test_groups_sum_inside_first_and_then_between_each_other():
    cluster = Cluster(
        groups=(group("a", FAST, FAST), group("b", FAST, FAST)), links={("a", "b"): SLOW}
    )
    stages = [stage("a", 0), stage("a", 1), stage("b", 0), stage("b", 1)]
    inside = ring_s(2, 1e9, FAST)
    assert sum_s(stages, cluster, 1e9) == pytest.approx(inside + ring_s(2, 1e9, SLOW))
    assert sum_s(stages, cluster, 1e9, flat=True) == pytest.approx(ring_s(4, 1e9, SLOW))


def test_a_group_over_two_nodes_sums_at_the_speed_between_them():
    cluster = Cluster(groups=(group("a", FAST, SLOW),))
    assert sum_s([stage("a", 0), stage("a", 1)], cluster, 1e9) == ring_s(2, 1e9, FAST)
    assert sum_s([stage("a", 0), stage("a", 4)], cluster, 1e9) == ring_s(2, 1e9, SLOW)


def test_groups_without_a_link_cannot_sum():
    cluster = Cluster(groups=(group("a", FAST, FAST), group("b", FAST, FAST)))
    with pytest.raises(UserError, match="no link"):
        sum_s([stage("a", 0), stage("b", 0)], cluster, 1.0)
