"""What the parity gate finds on the simulated chip, right and broken; a process for each case."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest
import torch

from mxn.models.catalogue import shipped_models
from mxn.train.run.data.batch import MicroBatch
from mxn.train.run.gate.check import Finding, check_layers
from mxn.train.run.gate.optimizer import check_optimizer
from mxn.train.run.gate.process import Verdict, _refuse
from mxn.train.run.job import DeviceSettings
from mxn.train.run.supervise.needs import GateError
from mxn.train.run.weights import ModelSource


def check(sim: torch.device, model: str = "llama", dtype=torch.float32) -> list[Finding]:
    source = ModelSource.open(shipped_models()[f"mxn-shakespeare-{model}"], seq_tokens=32)
    random = torch.Generator().manual_seed(1)
    batch = MicroBatch.of_rows(torch.randint(0, 1000, (2, 32), generator=random))
    return check_layers(source, batch, sim, dtype)


def a_right_chip_passes(sim):
    for model in ("llama", "dsv3"):
        for dtype in (torch.float32, torch.bfloat16):
            findings = check(sim, model, dtype)
            assert [str(f) for f in findings if f.problem] == []


@contextmanager
def broken(operator: str, wrong):
    """Let the simulated chip compute an operator of aten with `wrong`."""
    library = torch.library.Library("aten", "IMPL")
    library.impl(operator, wrong, "PrivateUse1")
    try:
        yield
    finally:
        library._destroy()


def a_function_that_is_a_percent_off_is_named(sim):
    def silu(x):
        return (torch.nn.functional.silu(x.cpu()) * 1.01).to(x.device)

    with broken("silu", silu):
        findings = check(sim)
    bad = [f for f in findings if f.problem and f.operator]
    assert {f.operator.split("(")[0] for f in bad} == {"silu"}
    assert bad[0].error == pytest.approx(0.01, rel=0.01)
    assert str(bad[0]).startswith("operator silu([2, 32, ")
    assert {f.layer for f in bad} == {"block"}


def one_flipped_bit_in_a_large_result_is_found(sim):
    def mm(a, b):
        right = a.cpu() @ b.cpu()
        bits = right.view(torch.int32)
        bits.view(-1)[bits.numel() // 3] ^= 1 << 23  # the exponent: twice or half
        return right.to(a.device)

    with broken("mm", mm):
        findings = check(sim)
    bad = {f.operator.split("(")[0] for f in findings if f.problem and f.operator}
    assert "linear" in bad
    assert "silu" not in bad


def a_gradient_that_is_wrong_is_found_where_the_result_is_right(sim):
    def silu_backward(gradient, x):
        right = torch.ops.aten.silu_backward(gradient.cpu(), x.cpu())
        return (-right).to(x.device)

    with broken("silu_backward", silu_backward):
        findings = check(sim)
    bad = [f for f in findings if f.problem and f.operator]
    assert {(f.operator.split("(")[0], f.tensor) for f in bad} == {("silu", "gradient of input 0")}


def an_operator_that_a_chip_does_not_have_is_named(sim):
    def rsqrt(x):
        raise NotImplementedError("no such operator")

    with broken("rsqrt", rsqrt), pytest.raises(NotImplementedError):
        torch.ones(2, device=sim).rsqrt()
    # The layer as a whole would raise as well: the operator is found before it is tried.
    with broken("rsqrt", rsqrt):
        findings = check(sim)
    bad = [f for f in findings if f.problem and f.operator]
    assert bad[0].operator.startswith("rsqrt")
    assert bad[0].problem == "raised NotImplementedError: no such operator"


def optimizer_findings(sim: torch.device, dtype=torch.float32) -> list[Finding]:
    source = ModelSource.open(shipped_models()["mxn-shakespeare-llama"], seq_tokens=32)
    return list(check_optimizer(source, sim, dtype))


def steps_of_a_right_chip_pass(sim):
    for dtype in (torch.float32, torch.bfloat16):
        findings = optimizer_findings(sim, dtype)
        assert [str(f) for f in findings if f.problem] == []
        operators = {finding.operator.split("(")[0] for finding in findings}
        assert {"lerp_", "addcmul_", "sqrt", "addcdiv_", "AdamW.step"} <= operators
        assert ("copy_" in operators) == (dtype == torch.bfloat16)  # master weights to weights


def an_operator_of_the_optimizer_that_is_wrong_is_named(sim):
    def addcdiv(self, a, b, value=1, out=None):
        result = torch.addcdiv(self.cpu(), a.cpu(), b.cpu(), value=1.001 * value)
        return out.copy_(result)

    with broken("addcdiv.out", addcdiv):
        findings = optimizer_findings(sim)
    bad = [f for f in findings if f.problem]
    assert {f.operator.split("(")[0] for f in bad} == {"addcdiv_"}
    assert "in the optimizer AdamW" in str(bad[0])
    # Layers do not call it: they pass on this chip.
    with broken("addcdiv.out", addcdiv):
        assert [str(f) for f in check(sim) if f.problem] == []


def a_wrong_chip_stops_the_job_with_operator_chip_error_and_budget(sim):
    with broken("silu", lambda x: torch.zeros_like(x)):
        findings = check(sim)
    verdict = Verdict(
        device="sim:0", chip="simulated", dtype="float32", findings=tuple(findings), seconds=1.0
    )
    with pytest.raises(GateError) as caught:
        _refuse(verdict, DeviceSettings(name="b", device="sim:0"))
    text = str(caught.value)
    assert "sim:0 (simulated, float32) does not compute what the CPU does" in text
    assert "operator silu(" in text
    assert "RMS ratio 1.00e+00 over 3e-06" in text
    assert "leave group 'b' out" in text


CASES = [
    value
    for name, value in list(globals().items())
    if getattr(value, "__module__", "") == __name__
    and name not in ("check", "optimizer_findings", "broken", "run")
    and callable(value)
]


def run(name: str, log: str) -> None:
    """Run a case with the chip loaded before any backward pass; its output goes to a file."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from mxn.chips.sim import device

    device.load()
    torch.set_num_threads(1)
    globals()[name](torch.device("sim:0"))
