"""Every native family against transformers: logits, loss and the gradient of every weight."""

from __future__ import annotations

import pytest
import torch

from mxn.train.run.data import MicroBatch
from mxn.train.run.weights import ModelSource
from support import tiny
from support.training import (
    gradients,
    random_ids,
    reference_gradients,
    relative,
    whole_stage,
)

RELATIVE_ERROR = 2e-5  # float32; of the norm of a tensor


@pytest.mark.parametrize("case", list(tiny.CASES))
def test_logits_loss_and_gradients_are_those_of_transformers(case, tmp_path):
    reference = tiny.write(case, tmp_path)
    source = ModelSource.open(tmp_path, seq_tokens=32)
    stage = whole_stage(source)
    ids = random_ids(2, 29)
    batch = MicroBatch.of_rows(ids)

    loss = stage(None, batch)
    loss.backward()
    out = reference(ids, labels=ids, use_cache=False)
    (out.loss * batch.num_tokens).backward()

    assert relative(stage.logits(None, batch), out.logits) < RELATIVE_ERROR
    assert loss.item() == pytest.approx(out.loss.item() * batch.num_tokens, rel=1e-6)
    got = gradients([stage])
    if case == "internlm2":  # its queries, keys and values lie in one matrix, in another order
        assert all(gradient.abs().sum() > 0 for gradient in got.values())
        return
    want = reference_gradients(reference, source)
    assert got.keys() == want.keys()
    errors = {name: relative(got[name], want[name]) for name in want}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < RELATIVE_ERROR, f"{worst}: {errors[worst]:.1e}"


def test_bfloat16_comes_close_to_float32(tmp_path):
    tiny.write("llama3", tmp_path)
    source = ModelSource.open(tmp_path, seq_tokens=32)
    batch = MicroBatch.of_rows(random_ids(2, 29))
    wide, narrow = whole_stage(source), whole_stage(source, dtype=torch.bfloat16)
    assert narrow(None, batch).item() == pytest.approx(wide(None, batch).item(), rel=0.02)
