"""Profiles derived from data sheets, the catalogue they come from, and the scores."""

import math
from dataclasses import replace

import pytest

from mxn.chips import specs
from mxn.errors import UserError
from mxn.train.plan import fits
from mxn.train.plan.analytic import ChipNumbers, Roofline, derive_profile, numbers_of, share_at
from mxn.train.plan.cluster import Link
from mxn.train.plan.scores import regret, scores, spearman
from mxn.train.plan.sets import vtrain

SHAPE = vtrain.shape(2048, 4)
CHIP = ChipNumbers(
    name="a",
    peak_flop_per_s=300e12,
    memory_bytes_per_s=2e12,
    memory_bytes=80 * 10**9,
    tensor_link=Link(latency_s=1e-5, bytes_per_s=2e11),
)


def test_efficiency_grows_with_size_and_is_flat_outside():
    anchors = ((1e9, 0.6), (16e9, 0.9))
    assert share_at(anchors, 1.0) == 0.6
    assert share_at(anchors, 1e12) == 0.9
    assert share_at(anchors, 4e9) == pytest.approx(0.75)


def test_small_passes_are_as_long_as_their_launches():
    roofline = Roofline(block_launch_s=1.0)
    block = derive_profile(CHIP, SHAPE, [1], [1], roofline=roofline).layer("block", 1, 1)
    assert (block.forward_s, block.backward_s) == (1.0, 2.0)


def test_work_grows_with_the_micro_batch_and_shrinks_with_width():
    roofline = replace(fits.roofline(), block_launch_s=0.0, tensor_launch_s=0.0)
    found = derive_profile(CHIP, SHAPE, [4, 8], [1, 4], roofline=roofline)
    block = {key: found.layer("block", *key).forward_s for key in ((4, 1), (8, 1), (8, 4))}
    assert 1.8 < block[8, 1] / block[4, 1] <= 2.05
    assert block[8, 1] / 4 < block[8, 4] < block[8, 1]
    assert found.basis == "derived"


def test_what_is_whole_in_a_block_is_timed_as_the_constants_were_fitted():
    """The measured runs had whole norms too, and their shapes do not tell them apart."""
    whole = [
        replace(layer, whole_bytes=layer.activation_bytes / 4) if layer.is_block else layer
        for layer in SHAPE.layers
    ]
    roofline = replace(fits.roofline(), block_launch_s=0.0, tensor_launch_s=0.0)
    found = [
        derive_profile(CHIP, shape, [4], [8], roofline=roofline).layer("block", 4, 8)
        for shape in (SHAPE, replace(SHAPE, layers=tuple(whole)))
    ]
    assert found[0] == found[1]


def test_an_odd_width_of_the_head_hurts():
    plain = derive_profile(CHIP, SHAPE, [4], [1]).layer("head", 4, 1)
    odd = derive_profile(CHIP, SHAPE, [4], [1], widths={"head": 50257}).layer("head", 4, 1)
    assert odd.forward_s > 2 * plain.forward_s


def test_a_chip_without_a_link_cannot_share_a_layer():
    with pytest.raises(UserError, match="no link"):
        derive_profile(replace(CHIP, tensor_link=None), SHAPE, [1], [2])


def test_the_catalogue_gives_numbers_or_says_what_is_missing():
    a100 = numbers_of(specs.load("nvidia-a100-80g"))
    assert a100.peak_flop_per_s == 312e12
    assert a100.memory_bytes == 80 * 10**9
    assert a100.tensor_link is not None
    assert a100.tensor_link.basis == "measured"
    known = 0
    for name, spec in specs.all_specs().items():
        try:
            found = numbers_of(spec)
        except UserError as error:
            assert name in str(error)  # noqa: PT017
            continue
        assert 1e12 < found.peak_flop_per_s < 1e16
        assert 1e10 < found.memory_bytes_per_s < 1e14
        known += 1
    assert known >= 15


def test_fits_say_where_they_come_from():
    for name in ("roofline", "sailor", "vtrain-profiles"):
        assert fits.load(name)["by"].startswith("bench/train/fit.py")
        assert fits.load(name)["fitted_on"]
    with pytest.raises(UserError, match="no fit"):
        fits.load("nothing")


def test_a_profile_is_derived_with_the_fitted_constants_unless_told():
    assert fits.roofline() == Roofline()


def test_scores_are_of_the_errors_and_the_order():
    found = scores([1.1, 2.0, 3.3], [1.0, 2.0, 3.0])
    assert found["mape"] == pytest.approx(0.2 / 3)
    assert found["worst"] == pytest.approx(0.1)
    assert found["spearman"] == 1.0
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    assert spearman([1, 1, 2], [1, 1, 2]) == 1.0
    assert math.isnan(spearman([1, 1], [1, 2]))


def test_regret_is_what_the_chosen_one_takes_longer():
    assert regret([1.0, 2.0], [12.0, 10.0]) == pytest.approx(0.2)
    assert regret([2.0, 1.0], [12.0, 10.0]) == 0.0
