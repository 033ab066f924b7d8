"""The second half of a block: an MLP, or experts behind a router.

The router's choice bias (DeepSeek-V3) is carried along and not trained; there is no auxiliary loss
that balances the experts. In a team (tensor parallelism) each rank has a part of the inner width of
every MLP. Start at `make_feedforward`.
Shape letters: S tokens in a line, D hidden, E experts, k chosen ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mxn.kernels.ops.activation.torch_ import ACTIVATIONS
from mxn.kernels.ops.route.torch_ import route
from mxn.models.names import Names, Part
from mxn.models.spec import MlpSpec, MoeSpec
from mxn.train.run.net.parts import Tree
from mxn.train.run.net.shard import enter, leave, share_of


class Mlp:
    """down(act(gate(x)) · up(x)); the names decide whether gate and up are stored as one."""

    def __init__(
        self, spec: MlpSpec, up: Part, down: str, tree: Tree, *, is_summed: bool = True
    ) -> None:
        """`is_summed` False: the caller enters and leaves the team, for many MLPs at once."""
        self.is_gated = spec.is_gated
        self.activate = ACTIVATIONS[spec.activation]
        hidden, width = (
            tree.model.hidden,
            share_of(spec.intermediate, tree.make.team, "MLP columns"),
        )
        sections = (width,) * ((2 if spec.is_gated else 1) // len(up))
        self._enters = tree.make.team if is_summed else None
        self.up = [tree.linear_in(path, hidden, *sections) for path in up]
        self.down = tree.linear_out(down, width, hidden, is_summed=is_summed)

    def __call__(self, x: Tensor) -> Tensor:
        x = enter(x, self._enters)
        parts = [linear(x) for linear in self.up]
        if not self.is_gated:
            return self.down(self.activate(parts[0]))
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
        return self.down(self.activate(gate) * up)


class Experts:
    """Each token goes through its k best experts; shared ones see all tokens."""

    def __init__(self, spec: MoeSpec, names: Names, tree: Tree) -> None:
        self.spec, self.team = spec, tree.make.team
        count = spec.router.num_experts
        self.router = tree.linear(names.router, tree.model.hidden, count)
        is_biased = spec.router.scoring == "sigmoid"
        self._bias = tree.buffer(names.router_bias, count) if is_biased else None
        each = MlpSpec(intermediate=spec.intermediate, activation=spec.activation)
        self.experts = [
            Mlp(
                each,
                tuple(path.format(e=e) for path in names.expert_gate_up),
                names.expert_down.format(e=e),
                tree,
                is_summed=False,
            )
            for e in range(count)
        ]
        self.shared = self.shared_gate = None
        if spec.shared:
            self.shared = Mlp(spec.shared, names.shared_gate_up, names.shared_down, tree)
        if spec.has_shared_gate:
            self.shared_gate = tree.linear(names.shared_gate, tree.model.hidden, 1)

    def __call__(self, x: Tensor) -> Tensor:
        x_SD = x.flatten(0, 1)
        out = self._routed(x_SD)
        if self.shared is not None:
            y = self.shared(x_SD)
            if self.shared_gate is not None:
                y = y * torch.sigmoid(self.shared_gate(x_SD))
            out = out + y
        return out.view_as(x)

    def _routed(self, x_SD: Tensor) -> Tensor:
        # float32: rounding must not decide which expert is chosen.
        logits_SE = nn.functional.linear(x_SD.float(), self.router.weight.float())
        bias_E = getattr(*self._bias) if self._bias else None
        weights_Sk, chosen_Sk = route(logits_SE, bias_E, self.spec.router)
        x_SD, weights_Sk = enter(x_SD, self.team), enter(weights_Sk, self.team)
        order = chosen_Sk.flatten().argsort(stable=True)
        tokens = order // chosen_Sk.shape[1]
        # The one wait for the device: how many rows each expert has decides the shapes.
        counts = torch.bincount(chosen_Sk.flatten(), minlength=len(self.experts)).tolist()
        parts = [
            self.experts[e](x_SD[rows]) for e, rows in enumerate(tokens.split(counts)) if len(rows)
        ]
        weighted = torch.cat(parts).float() * weights_Sk.flatten()[order].unsqueeze(1)
        total = torch.zeros(x_SD.shape, dtype=torch.float32, device=x_SD.device)
        return leave(total.index_add(0, tokens, weighted), self.team).to(x_SD.dtype)


def make_feedforward(spec: MlpSpec | MoeSpec, names: Names, tree: Tree) -> Mlp | Experts:
    if isinstance(spec, MoeSpec):
        return Experts(spec, names, tree)
    return Mlp(spec, names.gate_up, names.down, tree)
