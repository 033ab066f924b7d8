"""Training in float16: steps that do not fit are left out by all ranks, and nothing is lost."""

from __future__ import annotations

import math

import pytest
import torch

from mxn.errors import UserError
from mxn.train.run.loss_scale import FIRST, GROW_EVERY, LossScale
from mxn.train.run.single import SingleTrainer
from support import parity_cases
from support.parity_cases import plan_of
from support.ranks import run_ranks


def test_without_float16_it_is_1_and_takes_everything():
    scale = LossScale.for_step(1000, is_on=False)
    assert scale.takes(math.inf)  # who clips says what is wrong with it
    assert scale.value == 1


def test_it_halves_at_once_and_doubles_after_many_steps():
    scale = LossScale.for_step(1024, is_on=True)
    assert scale.value == FIRST / 1024
    assert not scale.takes(math.inf)
    assert not scale.takes(math.nan)
    assert scale.value == FIRST / 4096
    assert all(scale.takes(1.0) for _ in range(GROW_EVERY - 1))
    assert scale.value == FIRST / 4096
    assert scale.takes(1.0)
    assert (scale.value, scale.good_steps) == (FIRST / 2048, 0)


def test_a_loss_that_has_diverged_is_said_in_the_end():
    scale = LossScale.for_step(1024, is_on=True)
    for _ in range(100):
        if scale.takes(math.nan):
            return  # `clip_factor` raises
    pytest.fail("it goes on for ever")


def trainer(dtype: torch.dtype, value: float | None = None, micro_batches: int = 4):
    made = SingleTrainer(
        *parity_cases.job(20, micro_batches, str(parity_cases.small_model())), dtype=dtype
    )
    if value is not None:
        made.loss_scale.value = value
    return made


def test_float16_learns_what_float32_does():
    want = [log.loss for log in trainer(torch.float32).run()]
    logs = trainer(torch.float16).run()
    assert [log.loss for log in logs] == pytest.approx(want, rel=2e-3)
    assert all(log.is_taken for log in logs)


def test_small_gradients_are_lost_without_a_factor():
    """Of a loss made small they are below what float16 knows; the factor lifts them."""
    norms = []
    for value in (2.0**-30, 1.0):
        made = trainer(torch.float16, value)
        norms.append(made.train_step().gradient_norm)
    assert norms[0] == 0
    assert norms[1] > 0


def test_a_step_beyond_float16_changes_nothing_and_the_next_one_does():
    made = trainer(torch.float16, 2.0**22)
    before = {key: p.detach().clone() for key, p in made.stage.named_parameters()}
    log = made.train_step()
    assert (log.is_taken, made.optimizer.num_steps) == (False, 0)
    assert all(torch.equal(p, before[key]) for key, p in made.stage.named_parameters())
    while not made.train_step().is_taken:
        assert made.loss_scale.value > 1
    assert made.optimizer.num_steps == 1
    assert all(p.isfinite().all() for p in made.stage.parameters())


def test_ranks_of_two_dtypes_leave_out_the_same_steps():
    """The float32 stage sees no overflow of its own; the norm of all tells it."""
    plan = plan_of((4, [[(0, 3)], [(3, 6)]]))
    model = str(parity_cases.small_model())
    arguments = {"plan": plan.to_json(), "steps": 20, "model": model,
                 "dtypes": ["float16", "float32"], "first_scale": 2.0**20}  # fmt: skip
    ranks = run_ranks("support.parity_cases:train", ["cpu", "cpu"], arguments)
    assert ranks[0]["taken"] == ranks[1]["taken"]
    assert False in ranks[0]["taken"]
    assert ranks[0]["taken"][-1]
    assert ranks[0]["loss"] == ranks[1]["loss"]
    assert ranks[0]["loss"][-1] < ranks[0]["loss"][0]


def test_a_norm_that_is_no_number_still_ends_a_job_in_float32():
    made = trainer(torch.float32)
    with torch.no_grad():
        next(made.stage.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match="diverged"):
        made.train_step()
