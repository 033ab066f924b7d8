"""Every native family on the C++ kernels, against transformers: the same tests as for torch.

Weights and cache in float32, so that a wrong page, row or formula shows; what quantization costs is
tested in `test_native_formats.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mxn.chips import find_device
from mxn.kernels.batch import AttentionBatch, StepBatch
from mxn.kernels.native import formats, missing_reason
from mxn.models.load import load_model
from support import tiny
from support.family_parity import check_batch, check_chunks, check_greedy

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))


@pytest.fixture(scope="module", params=list(tiny.CASES))
def pair(request, tmp_path_factory):
    """(reference model, model on native kernels) of one family."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    reference = tiny.write(request.param, directory)
    loaded = load_model(
        directory, find_device("cpu"), "float32", format=formats.parse("f32"), num_threads=2
    )
    assert loaded.unused_tensors == ()
    return reference, loaded.model


def test_prefill_in_chunks_and_decode_give_the_logits_of_transformers(pair, record_error):
    check_chunks(*pair, record_error)


def test_a_batch_of_mixed_lengths_gives_the_logits_of_each_alone(pair, record_error):
    check_batch(*pair, record_error)


def test_greedy_tokens_are_those_of_transformers_over_64_steps(pair):
    check_greedy(*pair)


def test_a_step_of_no_tokens_gives_no_rows_and_leaves_the_cache(pair):
    _, model = pair
    cache = model.make_cache(2, 16)
    for layer in cache:
        layer.k.fill_(7)
    none = torch.empty(0, dtype=torch.int64)
    attention = AttentionBatch(
        query_starts=[0], context_lens=[], page_table_SP=none.view(0, 1), context_lens_S=none,
        query_starts_S1=torch.zeros(1, dtype=torch.int64), slots_T=none, page_tokens=16,
    )  # fmt: skip
    logits = model.forward(StepBatch(none, none, attention, None), cache)
    assert logits.shape == (0, model.vocab_size)
    assert all((layer.k == 7).all() for layer in cache)
