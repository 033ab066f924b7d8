"""Computes layers of a job on one chip, operator by operator and whole, and compares with the CPU.

The truth is float32 on the CPU, from the same inputs. Budgets are those of the kernels' parity
suite, times a stated slack. Knows one device; `process.py` knows the job. Start at `check_layers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mxn.kernels.parity import TOLERANCES, compare
from mxn.models.spec import MoeSpec
from mxn.train.run.gate.record import Call, mapped, record, tensors_of

if TYPE_CHECKING:
    from mxn.train.run.data.batch import MicroBatch
    from mxn.train.run.weights import ModelSource

# A weight's gradient is a sum over all tokens, in another order on each chip.
GRADIENT_SLACK = 4.0
# A block is about twenty operators one after another, and its weights are rounded as well.
LAYER_SLACK = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One tensor that was compared. `problem` None: within the budget."""

    layer: str  # kind of layer
    operator: str  # "" where the layer was computed as a whole
    tensor: str
    error: float  # RMS of the error over RMS of the truth
    budget: float
    problem: str | None = None

    def __str__(self) -> str:
        what = f"operator {self.operator}" if self.operator else "the whole layer"
        return f"{what} in {self.layer}, {self.tensor}: {self.problem or 'within its budget'}"


def check_layers(
    source: ModelSource, batch: MicroBatch, device: torch.device, dtype: torch.dtype
) -> list[Finding]:
    """Return what was compared: each operator that each kind of layer calls, then the layer whole.

    A layer with a wrong operator is not tried as a whole, nor one with experts in a dtype that
    rounds.

    `batch` is on the CPU. A layer's input is the true output of the layers before it, as far as
    those are computed here: embedding, then the first block of each kind.
    """
    from mxn.train.shapes import layer_kinds

    kinds = layer_kinds(source.spec)
    findings: list[Finding] = []
    hidden: Tensor | None = None
    for kind, layer in {kind: kinds.index(kind) for kind in kinds}.items():
        found, output = _check_layer(source, kind, layer, hidden, batch, device, dtype)
        findings += found
        if layer < len(kinds) - 1:
            hidden = output
    return findings


def _check_layer(
    source: ModelSource,
    kind: str,
    layer: int,
    hidden: Tensor | None,
    batch: MicroBatch,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[Finding], Tensor]:
    cpu = torch.device("cpu")
    alike = source.stage(layer, layer + 1, dtype=dtype)
    given = None if hidden is None else _leaf(hidden, cpu, dtype)
    alike(given, batch)  # tables that are made once are made now, and not written down
    calls = record(lambda: alike(given, batch))
    findings = [found for call in calls for found in check_call(call, kind, device)]
    truth = _run_layer(source, layer, hidden, batch, cpu, torch.float32)
    is_sound = all(finding.problem is None for finding in findings)
    if is_sound and not (_routes(source, layer) and dtype != torch.float32):
        got = _run_layer(source, layer, hidden, batch, device, dtype)
        for name, want in truth.items():
            findings.append(compared(kind, "", name, want, got[name], LAYER_SLACK, dtype))
    return findings, truth["output"]


def _routes(source: ModelSource, layer: int) -> bool:
    """Whether a layer has experts: rounding sends a token to another one, rightly."""
    blocks = source.spec.layers
    return 0 < layer <= len(blocks) and isinstance(blocks[layer - 1].ffn, MoeSpec)


def _run_layer(
    source: ModelSource,
    layer: int,
    hidden: Tensor | None,
    batch: MicroBatch,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return output and gradients of a layer, on the CPU in float32, by name."""
    stage = source.stage(layer, layer + 1, dtype=dtype, device=device)
    given = None
    if hidden is not None:
        given = _leaf(hidden, device, dtype)
    output = stage(given, batch.to(device))
    output.backward(_seed(output.detach()))
    results = {"output": output.detach()}
    if given is not None and given.grad is not None:
        results["gradient of its input"] = given.grad
    for name, parameter in stage.layer_parameters(layer).items():
        if parameter.grad is not None:
            results[f"gradient of {name}"] = parameter.grad
    return {name: tensor.float().cpu() for name, tensor in results.items()}


def check_call(call: Call, kind: str, device: torch.device) -> Iterator[Finding]:
    """Repeat a call on the CPU in float32 and on the device as it was, forward and backward."""
    wanted = _results(call, lambda tensor: _widened(tensor))
    dtype = next((t.dtype for t in tensors_of(call.args) if t.is_floating_point()), torch.float32)
    try:
        found = _results(call, lambda tensor: tensor.to(device))
    except Exception as error:  # whatever a chip raises, it cannot compute this operator
        said = f"raised {type(error).__name__}: {str(error).splitlines()[0]}"
        yield Finding(
            layer=kind, operator=str(call), tensor="call", error=float("nan"), budget=0.0,
            problem=said,
        )  # fmt: skip
        return
    for name, want in wanted.items():
        slack = GRADIENT_SLACK if name.startswith("gradient") else 1.0
        yield compared(kind, str(call), name, want, found[name], slack, dtype)


def _results(call: Call, change: Any) -> dict[str, Tensor]:
    """Return outputs and gradients of a call by name, on the CPU."""
    leaves: list[Tensor] = []

    def placed(tensor: Tensor) -> Tensor:
        moved = change(tensor.detach().clone())  # it may be written to
        if tensor.requires_grad and moved.is_floating_point():
            moved = moved.detach().clone().requires_grad_()
            leaves.append(moved)
        return moved

    out = call.fn(*mapped(call.args, placed), **mapped(call.kwargs, placed))
    outputs = list(tensors_of(out))
    results = {f"output {i}": tensor for i, tensor in enumerate(outputs)}
    wants = [tensor for tensor in outputs if tensor.requires_grad]
    if leaves and wants:
        seeds = [_seed(tensor.detach()) for tensor in wants]
        gradients = torch.autograd.grad(wants, leaves, seeds, allow_unused=True)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                results[f"gradient of input {i}"] = gradient
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def _leaf(hidden: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return hidden.detach().to(device=device, dtype=dtype, copy=True).requires_grad_()


def _seed(output: Tensor) -> Tensor:
    """Return the gradient that comes from behind: the same numbers on every chip."""
    random = torch.Generator().manual_seed(output.numel())
    seed = torch.randn(output.shape, generator=random)
    return seed.to(device=output.device, dtype=output.dtype)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def compared(
    kind: str, operator: str, name: str, want: Tensor, got: Tensor, slack: float, dtype: torch.dtype
) -> Finding:
    """Hold a tensor against the truth, with the budget of `dtype` times `slack`."""
    budget = TOLERANCES[str(dtype).removeprefix("torch.")] * slack
    if want.is_floating_point():
        want, got = want.float(), got.float()
    if not operator or name.startswith("gradient"):
        # Rows of such tensors differ in size for reasons of their own (a causal mask leaves the
        # first query nothing to learn): an element is held against the whole tensor.
        want, got = want.flatten(), got.flatten()
    error, mismatch = compare(name, want, got, budget)
    problem = None if mismatch is None else mismatch.problem
    return Finding(
        layer=kind, operator=operator, tensor=name, error=error, budget=budget, problem=problem
    )
