"""Rows whose maximum leaves the calibrated range are computed again: counted, and exact.

The whole decoder, with ranges that no prompt could have given: far off, one-sided, too narrow.
"""

from __future__ import annotations

import pytest
import torch

from mxn.chips import find_device
from mxn.kernels.native import formats, missing_reason
from mxn.models.base import LayerCache
from mxn.models.load import load_model
from mxn.models.native.decoder import _one_prompt
from support import tiny
from support.paged import Session

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))


# Grouped heads, a softcap with windows, one latent head for all.
@pytest.fixture(scope="module", params=["llama2", "gemma2", "deepseek_v2"])
def models(request, tmp_path_factory):
    """Return the same weights with a float32 cache and with an int8 cache."""
    case = next(name for name in tiny.CASES if name.replace("-", "_").startswith(request.param))
    directory = tmp_path_factory.mktemp("model")
    tiny.write(case, directory)
    return [
        load_model(
            directory, find_device("cpu"), "float32", format=formats.parse("f32", kind),
            num_threads=threads,
        ).model
        for kind in ("f32", "int8") for threads in (1, 3)
    ]  # fmt: skip


@torch.inference_mode()
def logits(model, maxima: list[tuple[float, float]]) -> tuple[torch.Tensor, int]:
    """Return the logits of a fixed traffic, and how many rows were computed twice."""
    model.use_maxima(maxima)
    before = model.num_recomputed
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, tiny.VOCAB, (90,), generator=generator).tolist()
    session = Session(model)
    parts = [*session.step({0: tokens[:70], 1: tokens[70:]}).values()]
    for token in (5, 9):
        parts += session.step({1: [token], 0: [token]}).values()
    model.use_maxima([(0.0, 0.0)] * len(maxima))
    return torch.cat(parts), model.num_recomputed - before


def assert_close(model, got: torch.Tensor, want: torch.Tensor) -> None:
    """A last bit may turn the rounding of an int8 key of the next layer."""
    allowed = 0.02 if model.format.cache == "int8" else 2e-5
    assert (got - want).abs().max() <= allowed * want.abs().max()


def test_rows_outside_of_the_range_are_counted_and_exact(models):
    for model in models:
        layers = len(model.spec.layers)
        want, none = logits(model, [(0.0, 0.0)] * layers)
        assert none == 0
        wide, none = logits(model, [(0.0, 60.0)] * layers)
        assert none == 0
        assert_close(model, wide, want)
        rows = 94 * sum(layer.attention.num_heads for layer in model.spec.layers)
        for phi, margin in ((500.0, 1.0), (-500.0, 1.0), (-2000.0, 1.0)):
            got, count = logits(model, [(phi, margin)] * layers)
            assert count == rows, "every row is far outside"
            assert torch.equal(got, want), "what is computed again is what was computed before"
        got, count = logits(model, [(0.0, 0.2)] * layers)
        assert 0 < count < rows, "a range in the middle: some rows only"
        assert_close(model, got, want)


def test_one_long_context_is_split_and_each_part_computed_again_alone(models):
    for model in (models[1], models[2]):  # float32 on three threads, int8 on one
        layers = len(model.spec.layers)
        tokens = torch.randint(3, tiny.VOCAB, (1100,), generator=torch.Generator().manual_seed(2))
        session = Session(model, num_pages=140)
        step(session, tokens[:-1].tolist())
        whole = step(Session(model, num_pages=140), tokens.tolist())[-1:]
        for maxima in ((0.0, 0.0), (0.0, 60.0), (300.0, 1.0), (0.0, 0.2)):
            model.use_maxima([maxima] * layers)
            session.tokens[0] = tokens[:-1].tolist()  # the same last token once more
            assert_close(model, step(session, tokens[-1:].tolist()), whole)
        model.use_maxima([(0.0, 0.0)] * layers)


@torch.inference_mode()
def step(session: Session, tokens: list[int]) -> torch.Tensor:
    return session.step({0: tokens})[0]


@torch.inference_mode()
def test_a_cache_that_begins_where_another_did_has_its_own_other_layers(models):
    model = models[0]
    prompt = _one_prompt(list(range(3, 20)))
    first = model.make_cache(4, 16)
    want = model.forward(prompt, first).clone()
    second = [first[0], *(LayerCache(torch.zeros_like(part.k), None) for part in first[1:])]
    for part in first[1:]:
        part.k.zero_()
    assert torch.equal(model.forward(prompt, second), want)
    assert all(part.k.any() for part in second), "keys went to the cache of the first call"
    assert not any(part.k.any() for part in first[1:])
