"""Every native family against transformers: prefill, decode, mixed batches, greedy tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mxn.models.load import load_model
from support import tiny
from support.family_parity import (
    RELATIVE_ERROR,
    check_batch,
    check_chunks,
    check_greedy,
    random_tokens,
    reference_logits,
    relative_error,
)
from support.paged import Session


@pytest.fixture(scope="module", params=list(tiny.CASES))
def pair(request, tmp_path_factory, device):
    """(reference model, native model) of one family."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    reference = tiny.write(request.param, directory)
    loaded = load_model(directory, device, "float32", allow_fallback=False)
    assert loaded.unused_tensors == ()
    return reference, loaded.model


@torch.inference_mode()
def test_prefill_gives_the_logits_of_transformers(pair, record_error):
    reference, model = pair
    tokens = random_tokens(29, seed=1)
    error = relative_error(Session(model).step({0: tokens})[0], reference_logits(reference, tokens))
    record_error("prefill", error)
    assert error < RELATIVE_ERROR


def test_prefill_in_chunks_and_decode_give_the_same_logits(pair, record_error):
    check_chunks(*pair, record_error)


def test_a_batch_of_mixed_lengths_gives_the_logits_of_each_alone(pair, record_error):
    check_batch(*pair, record_error)


def test_greedy_tokens_are_those_of_transformers_over_64_steps(pair):
    check_greedy(*pair)


@torch.inference_mode()
def test_only_the_wanted_rows_are_projected(pair):
    reference, model = pair
    tokens = random_tokens(9, seed=6)
    got = Session(model).step({0: tokens}, all_rows=False)[0]
    assert got.shape == (1, tiny.VOCAB)
    assert relative_error(got, reference_logits(reference, tokens)[-1:]) < RELATIVE_ERROR
