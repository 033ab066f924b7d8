"""The norm's own backward pass against autograd on the plain formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.train.run.net.parts import Make, RmsNorm


def plain(x: torch.Tensor, weight: torch.Tensor, eps: float, is_offset: bool) -> torch.Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if is_offset:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return normed.to(x.dtype) * weight


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    size=st.integers(1, 70),
    is_offset=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1e-4, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_gradients_are_those_of_autograd(shape, size, is_offset, dtype, scale, seed):
    torch.manual_seed(seed)
    norm = RmsNorm(Make(dtype=dtype), size, 1e-6, is_offset=is_offset)
    x = (torch.randn(*shape, size) * scale).to(dtype)
    upstream = torch.randn(*shape, size).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(size) * 0.3 + (not is_offset))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = norm.weight.detach().clone().requires_grad_()
    out, expected = norm(mine), plain(theirs, weight, 1e-6, is_offset)
    assert torch.equal(out, expected)
    out.backward(upstream)
    expected.backward(upstream)
    near = 2e-5 if dtype == torch.float32 else 3e-2
    rms = x.float().square().mean(-1, keepdim=True).add(1e-6).sqrt()
    factors = plain(torch.ones_like(x), weight, 0.0, is_offset).float()
    terms = (upstream.float() * factors / rms).abs().max()  # which may cancel
    for got, wanted, size in ((mine.grad, theirs.grad, terms), (norm.weight.grad, weight.grad, 1)):
        assert got.dtype == dtype
        assert (got - wanted).abs().max() <= near * max(size, wanted.abs().max())


def test_a_frozen_weight_gets_no_gradient_and_inputs_can_go_without():
    norm = RmsNorm(Make(), 8, 1e-6)
    torch.nn.init.ones_(norm.weight)
    norm.weight.requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None
    assert x.grad is not None
    norm.weight.requires_grad_(True)
    norm(x.detach()).sum().backward()
    assert norm.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_input_and_a_factor_are_kept(dtype):
    norm = RmsNorm(Make(dtype=dtype), 64, 1e-6)
    torch.nn.init.ones_(norm.weight)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(torch.randn(4, 64, dtype=dtype, requires_grad=True))
    sizes = sorted(t.numel() * t.element_size() for t in kept if t is not norm.weight)
    assert sizes[-2:] == [16, 4 * 64 * dtype.itemsize]
