"""Every native family on the C++ kernels, against transformers: the same tests as for torch.

Weights and cache in float32, so that a wrong page, row or formula shows; what quantization costs is
tested in `test_native_formats.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mxn.chips import find_device
from mxn.kernels.native import formats, missing_reason
from mxn.models.load import load_model
from support import tiny
from support.paged import Session, greedy

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))

RELATIVE_ERROR = 1e-4  # of the largest logit; float32


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


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.VOCAB, (count,), generator=generator).tolist()


@torch.inference_mode()
def reference_logits(reference, tokens: list[int]) -> torch.Tensor:
    return reference(torch.tensor([tokens]), use_cache=False).logits[0].float()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert not got.isnan().any(), "the model read memory that was never written"
    return ((got - want).abs().max() / want.abs().max()).item()


@torch.inference_mode()
def test_prefill_in_chunks_and_decode_give_the_logits_of_transformers(pair, record_error):
    reference, model = pair
    tokens = random_tokens(37, seed=2)
    session = Session(model)
    chunks = [tokens[:5], tokens[5:19], *([token] for token in tokens[19:])]
    got = torch.cat([session.step({0: chunk})[0] for chunk in chunks])
    error = relative_error(got, reference_logits(reference, tokens))
    record_error("decode", error)
    assert error < RELATIVE_ERROR


@torch.inference_mode()
def test_a_batch_of_mixed_lengths_gives_the_logits_of_each_alone(pair, record_error):
    reference, model = pair
    prompts = {seq: random_tokens(count, seed=seq) for seq, count in enumerate((1, 23, 8, 33))}
    session = Session(model)
    first = session.step({0: prompts[0], 1: prompts[1][:11], 2: prompts[2]})
    second = session.step({2: [7], 1: prompts[1][11:], 3: prompts[3], 0: [9]})
    got = {
        0: torch.cat((first[0], second[0])),
        1: torch.cat((first[1], second[1])),
        2: torch.cat((first[2], second[2])),
        3: second[3],
    }
    texts = {0: [*prompts[0], 9], 1: prompts[1], 2: [*prompts[2], 7], 3: prompts[3]}
    worst = max(relative_error(got[s], reference_logits(reference, texts[s])) for s in texts)
    record_error("batch", worst)
    assert worst < RELATIVE_ERROR


@torch.inference_mode()
def test_greedy_tokens_are_those_of_transformers_over_64_steps(pair):
    reference, model = pair
    prompt = random_tokens(11, seed=5)
    want = reference.generate(
        torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[0, len(prompt):].tolist()  # fmt: skip
    assert greedy(model, prompt, 64) == want
