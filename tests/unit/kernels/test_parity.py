"""The harness itself: each kind of wrong kernel must be caught, or parity proves nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mxn.kernels import parity, registry
from mxn.kernels.registry import Kernel

CPU = torch.device("cpu")


def failures(op: str, fn: object, dtype: torch.dtype = torch.float32) -> str:
    entry = Kernel(op, "wrong", fn)  # type: ignore[arg-type]
    return "\n".join(parity.check_kernel(entry, CPU, dtype).failures)


def torch_kernel(op: str) -> object:
    return registry.kernels_of(op)["torch"].fn


def test_truth_passes_its_own_cases() -> None:
    for op in ("rope", "paged_attention", "route"):
        result = parity.check_kernel(registry.kernels_of(op)["naive"], CPU, torch.float32)
        assert result.is_passed
        assert result.worst == 0


def test_small_error_is_caught_with_name_and_size() -> None:
    found = failures("softcap", lambda x, cap: torch.tanh(x / cap) * cap * (1 + 1e-4))
    assert "out: RMS ratio 1.0" in found
    assert "max abs" in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_wrong_element_of_many_is_caught(dtype: torch.dtype) -> None:
    want = parity.Maker(1, dtype).normal(64, 1024)
    want[7] /= 50  # a row of its own size
    tolerance = parity.TOLERANCES[registry.dtype_name(dtype)]
    assert parity.compare("out", want, want.clone(), tolerance) == (0.0, None)
    nearly = want * (1 + tolerance / 2)
    assert parity.compare("out", want, nearly, tolerance)[1] is None
    for place in ((0, 0), (7, 500), (63, 1023)):
        want[place] = want[place[0]].abs().mean()
        got = want.clone()
        got[place] = 0
        ratio, mismatch = parity.compare("out", want, got, tolerance)
        assert mismatch is not None
        if dtype == torch.bfloat16:
            assert ratio < tolerance, "the RMS alone sees it"
            assert f"element {place}" in str(mismatch)


def test_wrong_dtype_is_caught() -> None:
    found = failures("softcap", lambda x, cap: torch.tanh(x.float() / cap) * cap, torch.bfloat16)
    assert "is torch.float32" in found


def test_reading_behind_the_context_is_caught() -> None:
    """A kernel that adds a mask to scores of stale pages, instead of leaving them out."""
    right = torch_kernel("paged_attention")

    def reads_too_far(q, k, v, batch, *rest):  # type: ignore[no-untyped-def]
        longer = [context + 1 for context in batch.context_lens]
        return right(q, k, v, replace(batch, context_lens=longer, derived={}), *rest)

    assert "NaN" in failures("paged_attention", reads_too_far)


def test_a_kernel_that_raises_has_failed() -> None:
    def needs_a_gpu(x: torch.Tensor, cap: float) -> torch.Tensor:
        raise NotImplementedError("no such unit here")

    assert "raised NotImplementedError: no such unit here" in failures("softcap", needs_a_gpu)


def test_writing_elsewhere_is_caught() -> None:
    right = torch_kernel("kv_write")

    def writes_page_zero(k, v, k_cache, v_cache, slots):  # type: ignore[no-untyped-def]
        k_cache[0] = 0
        right(k, v, k_cache, v_cache, slots)

    assert "k_cache" in failures("kv_write", writes_page_zero)


def test_writing_nothing_is_caught() -> None:
    assert "v_cache" in failures("kv_write", lambda *_: None)


def test_a_wrong_expert_is_caught() -> None:
    right = torch_kernel("route")

    def next_expert(logits, bias, router):  # type: ignore[no-untyped-def]
        weights, ids = right(logits, bias, router)
        return weights, (ids + 1) % logits.shape[1]

    assert "ids: " in failures("route", next_expert)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_come_from_one_master(dtype: torch.dtype) -> None:
    case = parity.cases_of("softcap")[-1]
    master, _ = case.arguments(CPU, torch.float64)
    x, _ = case.arguments(CPU, dtype)
    assert torch.equal(x, master.to(dtype))
