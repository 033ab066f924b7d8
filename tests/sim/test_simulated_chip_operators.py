"""What torch does on the simulated chip equals what it does on the CPU."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.sim


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "add broadcast": lambda x: x + x[0],
    "scalar first": lambda x: 2 - x,
    "matmul": lambda x: x @ x.T,
    "linear": lambda x: F.linear(x, x[:3], x[:3, 0]),
    "batched matmul": lambda x: x.view(2, 3, 8) @ x.view(2, 8, 3),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "cat and stack": lambda x: torch.cat([x, torch.stack([x[0], x[1]])]),
    "where": lambda x: torch.where(x > 0, x, -x),
    "reductions": lambda x: torch.stack([x.sum(), x.mean(), x.amax(), x.std()]),
    "softmax": lambda x: x.softmax(-1).log_softmax(0),
    "norms": lambda x: F.layer_norm(x, (8,)) + F.rms_norm(x, (8,)),
    "conv": lambda x: F.conv2d(x[None, None], x[:3, :3][None, None]),
    "sdpa": lambda x: F.scaled_dot_product_attention(
        x.view(1, 2, 3, 8), x.view(1, 2, 3, 8), x.view(1, 2, 3, 8), is_causal=True
    ),
    "topk": lambda x: x.topk(3),
    "sort": lambda x: x.sort(dim=0, descending=True),
    "unique": lambda x: torch.unique((x * 2).int(), return_counts=True),
    "nonzero": lambda x: (x > 0).nonzero(),
    "cumsum": lambda x: x.cumsum(1),
    "svd": lambda x: torch.linalg.svdvals(x),
    "fft": lambda x: torch.view_as_real(torch.fft.rfft(x)),
    "int8 matmul": lambda x: torch._int_mm(x.to(torch.int8), x.to(torch.int8).T.contiguous()),
    "half types": lambda x: x.to(torch.bfloat16).float() + x.to(torch.float8_e4m3fn).float(),
    "embedding": lambda x: F.embedding(torch.tensor([1, 0, 5], device=x.device), x),
    "gather": lambda x: x.gather(1, torch.tensor([[1], [2]], device=x.device)),
    "item": lambda x: torch.tensor([x[1, 2].item(), *x[0].tolist()]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operator_equals_the_cpu(sim, name):
    x = _randn(6, 8)
    want = CASES[name](x)
    got = CASES[name](x.to(sim))
    want, got = (r if isinstance(r, tuple) else (r,) for r in (want, got))
    for w, g in zip(want, got, strict=True):
        assert name == "item" or g.device == sim
        assert g.shape == w.shape
        torch.testing.assert_close(g.cpu(), w, rtol=0, atol=1e-5)


def test_views_share_memory_and_keep_their_strides(sim):
    x = _randn(4, 6).to(sim)
    turned = x.t()[1:, ::2]
    assert turned.device == sim
    assert turned.stride() == (1, 12)
    assert turned.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    turned.fill_(7)
    assert (x[::2, 1:] == 7).all()
    assert not (x[1::2] == 7).any()


def test_view_of_a_real_tensor_as_complex_shares_memory(sim):
    x = _randn(3, 2).to(sim)
    torch.view_as_complex(x).mul_(2j)
    torch.testing.assert_close(
        x.cpu(), torch.view_as_real(torch.view_as_complex(_randn(3, 2)) * 2j)
    )


def test_in_place_changes_the_tensor_itself(sim):
    x = torch.ones(3, device=sim)
    address = x.data_ptr()
    assert x.add_(1).mul_(3) is x
    x[1:] -= 1
    assert x.tolist() == [6, 5, 5]
    assert x.data_ptr() == address


def test_resize_keeps_what_fits(sim):
    x = torch.arange(4.0, device=sim)
    x.resize_(2, 3)
    assert x.flatten()[:4].tolist() == [0, 1, 2, 3]
    x.untyped_storage().resize_(64)
    assert x.untyped_storage().nbytes() == 64
    assert x.untyped_storage().device == sim


def test_out_tensors_of_unknown_size_are_resized(sim):
    out = torch.empty(0, dtype=torch.int64, device=sim)
    torch.nonzero(torch.tensor([0, 1, 1], device=sim), out=out)
    assert out.tolist() == [[1], [2]]
    assert out.device == sim


def test_index_put_and_scatter(sim):
    def work(device):
        x = torch.zeros(4, 3, device=device)
        rows = torch.tensor([2, 0, 2], device=device)
        x.index_put_((rows,), torch.ones(3, 3, device=device), accumulate=True)
        x[x == 1] = 5
        x.scatter_(1, torch.tensor([[1]], device=device), 9.0)
        x.index_copy_(0, rows[:1], torch.full((1, 3), 4.0, device=device))
        return x.index_add_(0, rows[1:2], torch.ones(1, 3, device=device))

    assert work(sim).tolist() == work("cpu").tolist()


def test_gradients_equal_the_cpu(sim):
    def gradients(device):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Embedding(11, 8),
            torch.nn.Linear(8, 16),
            torch.nn.SiLU(),
            torch.nn.LayerNorm(16),
        ).to(device)
        y = net(torch.tensor([[1, 2, 10]], device=device))
        y = F.scaled_dot_product_attention(y, y, y, is_causal=True)
        y.square().sum().backward()
        return [p.grad for p in net.parameters()]

    for want, got in zip(gradients("cpu"), gradients(sim), strict=True):
        assert got.device == sim
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_training_steps_equal_the_cpu(sim, optimizer):
    def losses(device):
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        net.to(device)
        step = getattr(torch.optim, optimizer)(net.parameters(), lr=0.05)
        x = _randn(16, 4).to(device)
        out = []
        for _ in range(4):
            step.zero_grad()
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            step.step()
            out.append(loss.item())
        return out

    got = losses(sim)
    assert got[-1] < got[0]
    assert got == pytest.approx(losses("cpu"), rel=1e-5)


def test_autocast_computes_in_the_lower_precision(sim):
    x = torch.ones(4, 4, device=sim)
    with torch.autocast("sim", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        assert (x @ x).softmax(-1).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


def test_generator_is_deterministic_and_of_its_own(sim):
    torch.manual_seed(5)
    host_state = torch.get_rng_state()
    first = torch.rand(4, device=sim)
    assert torch.equal(torch.get_rng_state(), host_state), "drew from the generator of the CPU"
    assert not torch.equal(torch.rand(4, device=sim), first)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4, device=sim), first)

    generator = torch.Generator(device=sim).manual_seed(5)
    assert generator.device == sim
    assert torch.equal(torch.rand(4, device=sim, generator=generator), first)
    state = generator.get_state()
    again = torch.randn(3, device=sim, generator=generator)
    generator.set_state(state)
    assert torch.equal(torch.randn(3, device=sim, generator=generator), again)


def test_dropout_draws_from_the_device(sim):
    torch.manual_seed(5)
    host_state = torch.get_rng_state()
    x = torch.ones(1000, device=sim, requires_grad=True)
    y = F.dropout(x, 0.25)
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), host_state)
    assert 650 < (y > 0).sum().item() < 850
    assert torch.equal(x.grad, y.detach())


def test_multinomial_equals_the_cpu_with_the_same_seed(sim):
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    want = torch.multinomial(weights, 3, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator(device=sim).manual_seed(3)
    got = torch.multinomial(weights.to(sim), 3, generator=generator)
    assert got.tolist() == want.tolist()


def test_deepcopy_keeps_the_device_and_copies_the_memory(sim):
    layer = torch.nn.Linear(2, 2).to(sim)
    twin = copy.deepcopy(layer)
    assert twin.weight.device == sim
    with torch.no_grad():
        twin.weight.zero_()
    assert layer.weight.abs().sum() > 0


@pytest.mark.parametrize("target", ["cpu", "sim:0", "sim:1"])
def test_saved_tensors_load_where_they_are_told(sim, target):
    x = torch.arange(6.0, device=sim)
    file = io.BytesIO()
    torch.save({"whole": x, "part": x[2:]}, file)
    file.seek(0)
    loaded = torch.load(file, map_location=target)
    assert loaded["whole"].device == torch.device(target)
    assert loaded["part"].tolist() == [2, 3, 4, 5]
    loaded["whole"][2] = 50
    assert loaded["part"][0] == 50, "the view no longer shares its storage"


def test_safetensors_reach_the_device(sim, tmp_path):
    from safetensors.torch import load_file, save_file

    save_file({"w": torch.arange(6.0).view(2, 3)}, tmp_path / "w.safetensors")
    with torch.device(sim):
        layer = torch.nn.Linear(3, 2, bias=False)
    layer.load_state_dict({"weight": load_file(tmp_path / "w.safetensors")["w"]})
    assert layer.weight.device == sim
    assert layer.weight.tolist() == [[0, 1, 2], [3, 4, 5]]
    save_file(layer.state_dict(), tmp_path / "back.safetensors")
    assert load_file(tmp_path / "back.safetensors")["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_transformers_generates_the_tokens_of_the_cpu(sim):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.tensor([[1, 5, 9, 33], [1, 7, 7, 2]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    model.to(sim)
    prompt = prompt.to(sim)
    got = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert got.device == sim
    assert got.tolist() == want.tolist()
