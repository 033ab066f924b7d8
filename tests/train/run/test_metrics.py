"""A step as it is written down and shown: speeds are counted as predictions count them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from mxn.cli.train_progress import step_line
from mxn.train.run.rank import metrics
from mxn.train.run.rank_step import RankStep, RankTimes
from mxn.train.run.single import StepLog

LOG = StepLog(
    step=3, loss=2.5, num_tokens=40, learning_rate=1e-3, gradient_norm=1.5, seconds=0.5
)  # fmt: skip
STEP = RankStep(
    log=LOG, flags=0, times=(RankTimes(busy_s=0.4, waited_s=0.0, reduce_s=0.1),),
    counts=(4,), done=(4,), step_s=0.5, optimizer_s=0.0,
)  # fmt: skip


def test_all_tokens_of_the_rows_count_and_learned_ones_apart():
    told = metrics(STEP, 64)
    assert (told["tokens_per_s"], told["learned_tokens_per_s"]) == (128, 80)
    assert told["num_tokens"] == 40
    assert "loss_scale" not in told
    line = step_line({"step": 3, **told})
    assert "128 tokens/s, 80 learned" in line
    assert "learned" not in step_line({"step": 3, **metrics(STEP, 40)})


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("scale", [256.0, 1.0, 0.5])
def test_a_step_without_a_finite_loss_is_said_and_is_json(loss, scale):
    left = replace(LOG, loss=loss, gradient_norm=math.nan, loss_scale=scale, is_taken=False)
    told = metrics(replace(STEP, log=left), 64)
    kept = json.loads(json.dumps(told, allow_nan=False))
    assert (kept["loss"], kept["loss_scale"], kept["is_taken"]) == (None, scale, 0)
    line = step_line({"step": 3, **kept})
    assert "loss not finite" in line
    assert f"left out: gradients beyond float16 (loss scale {scale:g})" in line


def test_a_step_that_was_left_out_is_said_and_is_json():
    left = replace(LOG, gradient_norm=float("inf"), loss_scale=256.0, is_taken=False)
    told = metrics(replace(STEP, log=left), 64)
    assert json.loads(json.dumps(told, allow_nan=False))["gradient_norm"] is None
    assert "left out: gradients beyond float16 (loss scale 256)" in step_line({"step": 3, **told})
    taken = metrics(replace(STEP, log=replace(left, gradient_norm=1.0, is_taken=True)), 64)
    assert (taken["gradient_norm"], taken["loss_scale"]) == (1.0, 256.0)
    assert "left out" not in step_line({"step": 3, **taken})
