"""How `choose` finds its candidates: how often torch looks, what C++ does with large rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mxn.kernels.native.library import library, missing_reason
from mxn.kernels.ops.choose import torch_
from mxn.kernels.ops.filter_logits.naive import filter_logits
from mxn.kernels.params import ChoiceRule, LogitEdit
from mxn.kernels.parity import check_kernel
from mxn.kernels.registry import kernels_of
from support.native import usable_variants

VOCAB = 151_936
needs_native = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))


def logits_of(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(("vocab", "runs"), [(4000, 2), (20000, 3)])
def test_flat_logits_with_top_p_run_again_with_more_candidates(
    vocab: int, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flat row: 256 candidates hold a few percent of the mass, top_p wants 90 %."""
    given = []

    def sample(logits_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
        given.append(logits_RV)
        return torch.zeros(len(logits_RV), dtype=torch.int64)

    monkeypatch.setattr(torch_, "sample", sample)
    torch_.choose(logits_of(1, vocab, scale=1e-3), vocab, [ChoiceRule(1.0, 0.5, top_p=0.9)])
    assert len(given) == runs
    assert int(given[-1].isfinite().sum()) == pytest.approx(0.9 * vocab, rel=1e-3)


RULES = {
    "open": {},
    "top-k": {"top_k": 50},
    "more than blocks": {"top_k": 3000},
    "top-p": {"top_p": 0.9},
    "top-p of a flat row": {"top_p": 0.9, "temperature": 50.0},
    "min-p": {"min_p": 0.01},
    "min-p over top-p": {"min_p": 0.2, "top_p": 0.99},
    "all": {"top_k": 40, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7},
}


@needs_native
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_rows_of_a_real_vocabulary_choose_what_torch_chooses(name: str, ties: bool) -> None:
    """Over 40 random numbers a row; sums in another order may move a border by one token once."""
    row = logits_of(1, VOCAB, seed=len(name))
    if ties:
        row = row.bfloat16().float()
    logits = row.expand(40, -1).contiguous()
    rules = [ChoiceRule(**({"temperature": 1.0} | RULES[name])) for _ in range(40)]  # type: ignore[arg-type]
    rules = [rule._replace(uniform=(i + 0.37) / 40) for i, rule in enumerate(rules)]
    found = kernels_of("choose")["native"].fn(logits, VOCAB, rules)
    wanted = kernels_of("choose")["torch"].fn(logits, VOCAB, rules)
    assert sum(a != b for a, b in zip(found, wanted, strict=True)) <= 1


@needs_native
def test_an_edit_of_a_missing_row_or_token_is_refused_and_nothing_stays_changed() -> None:
    choose = kernels_of("choose")["native"].fn
    logits = logits_of(2, 9)
    before = logits.clone()
    good = LogitEdit(0, np.array([1]), 2.0, np.ones(1, np.float32))
    for row, token in ((2, 0), (-1, 0), (0, 9), (0, -1)):
        bad = LogitEdit(row, np.array([token]), 1.0, np.ones(1, np.float32))
        with pytest.raises(ValueError, match="choose: no"):
            choose(logits, 9, None, [good, bad])
        assert torch.equal(logits, before)
    with pytest.raises(ValueError, match="one rule for each row"):
        choose(logits, 9, [ChoiceRule()])


@needs_native
def test_rows_that_share_memory_are_edited_apart() -> None:
    logits = torch.zeros(1, 5).expand(3, -1)
    edits = [LogitEdit(r, np.array([r + 1]), 1.0, -np.ones(1, np.float32)) for r in range(3)]
    assert kernels_of("choose")["native"].fn(logits, 5, None, edits) == [1, 2, 3]
    assert not logits.any()


@needs_native
def test_the_ends_of_the_random_range_choose_tokens_with_mass() -> None:
    logits = torch.full((4, 200), -math.inf)
    logits[:, 50], logits[:, 150] = 0.0, 1.0
    last = 1 - 2.0**-24
    for options in ({}, {"top_p": 0.999}, {"min_p": 0.1}, {"top_k": 3}):
        rules = [ChoiceRule(1.0, uniform, **options) for uniform in (0.0, 0.25, 0.28, last)]  # type: ignore[arg-type]
        assert kernels_of("choose")["native"].fn(logits, 200, rules) == [50, 50, 150, 150]


@pytest.mark.parametrize("variant", usable_variants())
def test_every_variant_chooses_what_the_truth_says(variant: str) -> None:
    before = library().variant()
    try:
        library().use_variant(variant)
        found = check_kernel(kernels_of("choose")["native"], torch.device("cpu"), torch.float32)
        assert found.failures == ()
    finally:
        library().use_variant(before)


@needs_native
@pytest.mark.parametrize("name", ["open", "top-k", "top-p", "min-p", "all"])
def test_tokens_come_with_the_probabilities_of_the_filtered_softmax(name: str) -> None:
    """Chi-square over 20,000 draws; the limit is six standard deviations over its mean."""
    draws, vocab = 20_000, 333
    row = logits_of(1, vocab, seed=5, scale=1.5)
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rule = ChoiceRule(**({"temperature": 0.9} | RULES[name]))  # type: ignore[arg-type]
    rules = [rule._replace(uniform=u) for u in uniform.float().clamp_max(1 - 2.0**-24).tolist()]
    tokens = kernels_of("choose")["native"].fn(row.expand(draws, -1), vocab, rules)
    counts = torch.bincount(torch.tensor(tokens), minlength=vocab).double()
    numbers = (rule.temperature, rule.top_k, rule.top_p, rule.min_p)
    kept, _, _ = filter_logits(row, *(torch.tensor([number]) for number in numbers))
    expected = kept.double().softmax(1)[0] * draws
    assert counts[expected == 0].sum() == 0
    is_common = expected >= 5
    statistic = ((counts - expected)[is_common] ** 2 / expected[is_common]).sum()
    freedom = int(is_common.sum()) - 1
    assert statistic < freedom + 6 * math.sqrt(2 * max(freedom, 1))
