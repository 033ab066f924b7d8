"""Which kernel an op gets: pins, priorities, measurements, what parity turned off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mxn.errors import ConfigError, UnsupportedError
from mxn.kernels import registry, tune
from mxn.kernels.registry import Kernel, Ops

CHIP = "x86-test"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MXN_HOME", str(tmp_path))
    monkeypatch.delenv("MXN_KERNELS", raising=False)
    monkeypatch.setenv("MXN_KERNEL_TUNING", "on")
    monkeypatch.setattr(tune, "_CASE_BUDGET_S", 0.0)
    monkeypatch.setattr(tune, "_COLD_BYTES", 0)
    monkeypatch.setattr(tune, "_QUIET", 1e9)  # the machine that runs tests may be busy
    monkeypatch.setattr(tune, "_BUSY_LOAD", 1e9)
    return tmp_path


@pytest.fixture
def extra(monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """Kernels added for one test; `softcap` has only one kernel of its own."""
    known = registry.kernels_of("softcap")
    monkeypatch.setitem(registry._KERNELS, "softcap", known)
    return []


def bind(dtype: torch.dtype = torch.float32) -> Ops:
    return Ops.bind("cpu", CHIP, dtype)


def choice(ops: Ops, op: str, shape: str = "") -> registry.Choice:
    return next(c for c in ops.explain() if c.op == op and c.shape == shape)


def test_every_op_is_an_attribute_and_has_a_truth_and_a_torch_kernel() -> None:
    ops = bind()
    for name, op in registry.all_ops().items():
        assert {"naive", "torch"} <= set(registry.kernels_of(name))
        assert op.signature.startswith(f"{name}(")
        assert op.is_prepared or callable(getattr(ops, name))


def test_listing_ops_loads_no_torch() -> None:
    code = (
        "import sys; from mxn.kernels.registry import all_ops; all_ops(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_pin_is_obeyed_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_KERNELS", "rms_norm=naive, linear=torch")
    ops = bind()
    assert choice(ops, "rms_norm").kernel == "naive"
    assert choice(ops, "rms_norm").reason == "pinned by MXN_KERNELS"
    assert ops.prepare_linear(torch.ones(4, 4)).kernel == "torch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pin_that_is_not_available_says_what_is(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MXN_KERNELS", "softcap=sparkling")
    with pytest.raises(UnsupportedError, match=r"softcap=sparkling.*available: torch, naive"):
        bind(dtype)


def test_pin_for_another_chip_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_KERNELS", "linear=onednn")
    ops = Ops.bind("cpu", "arm-neon", torch.float32)
    with pytest.raises(UnsupportedError, match=r"is for chips 'x86\*', this is 'arm-neon'"):
        ops.prepare_linear(torch.ones(4, 4))


@pytest.mark.parametrize("text", ["rms_norm", "warp=torch", "rms_norm:torch"])
def test_pin_that_cannot_be_read_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_KERNELS", text)
    with pytest.raises(ConfigError, match="MXN_KERNELS"):
        bind()


def test_faster_kernel_is_chosen_and_measured_once(
    extra: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(x: torch.Tensor, cap: float) -> torch.Tensor:
        for _ in range(30):
            out = torch.tanh(x / cap) * cap
        return out

    registry.add_kernel(Kernel("softcap", "slow", slow, priority=50))
    first = bind()
    assert choice(first, "softcap").kernel == "torch"
    times = choice(first, "softcap").times_us
    assert set(times) == {"slow", "torch"}

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(tune, "interleaved_best", refuse)
    assert choice(bind(), "softcap").times_us == times


@pytest.mark.parametrize("limit", ["_QUIET", "_BUSY_LOAD"])
def test_on_a_busy_machine_priority_decides_and_nothing_is_stored(
    limit: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, limit, -1.0)
    ops = bind(torch.bfloat16)
    assert choice(ops, "paged_attention").kernel == "torch_runs"
    assert "machine busy" in choice(ops, "paged_attention").reason
    assert ops.choose_linear(64, 64, "bfloat16") == "onednn"
    assert not (home / "kernels").exists()


def test_a_kernel_must_beat_a_higher_priority_clearly() -> None:
    times = {"high": {"a": 100.0, "b": 10.0}, "low": {"a": 97.0, "b": 9.9}}
    assert tune.fastest(times, ["high", "low"]) == "high"
    times["low"] = {"a": 80.0, "b": 9.9}
    assert tune.fastest(times, ["high", "low"]) == "low"


def test_without_tuning_priority_decides(
    extra: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MXN_KERNEL_TUNING", "off")
    registry.add_kernel(Kernel("softcap", "better", lambda x, cap: x, priority=50))
    assert choice(bind(), "softcap").kernel == "better"


def test_kernel_that_parity_turned_off_is_not_chosen(
    extra: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mxn.kernels import parity

    monkeypatch.setenv("MXN_KERNEL_TUNING", "off")
    wrong = Kernel("softcap", "wrong", lambda x, cap: x * 1.01, priority=50)
    registry.add_kernel(wrong)
    monkeypatch.setattr(parity, "applicable", lambda chip, dtype: iter([wrong]))
    assert choice(bind(), "softcap").kernel == "wrong"
    (result,) = parity.verify(CHIP, torch.device("cpu"), torch.float32)
    assert not result.is_passed
    found = choice(bind(), "softcap")
    assert found.kernel == "torch"
    assert "failed its parity test" in found.rejected["wrong"]


def test_kernel_that_needs_proof_is_chosen_only_after_it_passed_here(
    extra: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mxn.kernels import parity

    monkeypatch.setenv("MXN_KERNEL_TUNING", "off")
    torch_fn = registry.kernels_of("softcap")["torch"].fn
    fresh = Kernel("softcap", "fresh", torch_fn, priority=50, needs_proof=True)
    registry.add_kernel(fresh)
    found = choice(bind(), "softcap")
    assert found.kernel == "torch"
    assert "run mxn kernels verify --dtype float32" in found.rejected["fresh"]
    monkeypatch.setattr(parity, "applicable", lambda chip, dtype: iter([fresh]))
    parity.verify(CHIP, torch.device("cpu"), torch.float32)
    assert choice(bind(), "softcap").kernel == "fresh"
    assert choice(bind(torch.bfloat16), "softcap").kernel == "torch"  # another dtype, another proof
    tune.Table.open(CHIP).judge({"softcap/fresh float32": "failed its parity test"})
    found = choice(bind(), "softcap")
    assert (found.kernel, found.rejected["fresh"]) == ("torch", "failed its parity test")


def test_kernel_with_a_shape_predicate_hands_over_what_it_does_not_take(
    extra: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MXN_KERNEL_TUNING", "off")
    registry.add_kernel(
        Kernel(
            "softcap", "even", lambda x, cap: torch.zeros_like(x),
            shapes=lambda x, cap: x.shape[-1] % 2 == 0, priority=50,
        )
    )  # fmt: skip
    ops = bind()
    assert ops.softcap(torch.ones(4), 1.0).sum() == 0
    assert ops.softcap(torch.ones(3), 1.0).sum() > 0


def test_two_kernels_of_one_name_are_refused(extra: list[Kernel]) -> None:
    with pytest.raises(ConfigError, match="already has a kernel named 'torch'"):
        registry.add_kernel(Kernel("softcap", "torch", lambda x, cap: x))


def test_linear_is_chosen_for_each_shape_and_stored(home: Path) -> None:
    ops = bind(torch.bfloat16)
    weight = torch.randn(48, 32, dtype=torch.bfloat16)
    linear = ops.prepare_linear(weight, torch.zeros(48, dtype=torch.bfloat16))
    assert (linear.in_features, linear.out_features) == (32, 48)
    assert linear.num_bytes == 48 * 32 * 2 + 48 * 2
    assert linear(torch.randn(2, 3, 32, dtype=torch.bfloat16)).shape == (2, 3, 48)
    found = choice(ops, "linear", "32x48 bfloat16")
    assert set(found.times_us["torch"]) == {"M=1", "M=16", "M=256"}
    (path,) = (home / "kernels").glob("*.json")
    assert path.name == f"{CHIP}-{torch.__version__}.json"
    stored = json.loads(path.read_text())["times"]
    assert all(entry["basis"] == "measured" for entry in stored.values())


def test_broken_table_is_measured_anew(home: Path) -> None:
    path = home / "kernels" / f"{CHIP}-{torch.__version__}.json"
    path.parent.mkdir()
    path.write_text("{ not json")
    assert choice(bind(), "paged_attention").times_us


def test_packed_linear_keeps_no_second_copy_of_the_weight() -> None:
    import weakref

    weight = torch.randn(64, 64)
    gone = weakref.ref(weight)
    linear = registry.kernels_of("linear")["onednn"].fn(weight, None)
    del weight
    assert gone() is None
    assert linear(torch.ones(1, 64)).shape == (1, 64)
