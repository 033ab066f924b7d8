"""The plan layers of one chunk on one device, as a module that can be trained.

Knows no pipelines, no optimizer and no files: weights come and go as dicts of named tensors for
each plan layer, under the names of the checkpoint, which do not depend on the plan. Start at
`StageModule`. Shape letters: R rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mxn.errors import UserError
from mxn.models.names import Names
from mxn.models.spec import DecoderSpec
from mxn.train.run.data.batch import MicroBatch
from mxn.train.run.net.context import Context, RopeTables
from mxn.train.run.net.layers import Block, Embedding, Head
from mxn.train.run.net.parts import Make
from mxn.train.run.net.shard import Cut, Team, cut_of

Recompute = Literal["none", "selective", "full"]
PlanLayer = Embedding | Block | Head


class StageModule(nn.Module):
    """Plan layers `first` to `end` - 1: 0 the embedding, 1 to L the blocks, L + 1 the head.

    The weights have no values yet: `load_layer_state` gives them (`weights.py` reads them from a
    checkpoint or draws them).
    """

    def __init__(
        self,
        spec: DecoderSpec,
        names: Names,
        first: int,
        end: int,
        *,
        biases: Collection[str] = frozenset(),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        recompute: Recompute = "none",
        team: Team | None = None,
    ) -> None:
        """`biases`: full names of the modules that have one, as `ModelSource.biases` says.

        `recompute`: what the backward pass computes again instead of keeping it: the attention
        matrices (selective), or all of a block but its input (full).

        `team`: the ranks that hold these layers together; blocks are cut over them, embedding and
        head are whole on each. Raises: UnsupportedError for blocks that cannot be cut evenly.
        """
        super().__init__()
        count = len(spec.layers) + 2
        if not 0 <= first < end <= count:
            raise UserError(f"layers {first} to {end - 1} are no part of a model of {count} layers")
        self.spec, self.names, self.first, self.end = spec, names, first, end
        self.dtype, self.device = dtype, torch.device(device)
        self.recompute: Recompute = recompute
        self.team = team
        make = Make(dtype=dtype, device=self.device, biases=biases, team=team)
        self.layers: nn.ModuleDict = nn.ModuleDict(
            {str(i): _layer(spec, names, i, make) for i in range(first, end)}
        )
        self._rope = RopeTables(self.device)
        if recompute == "selective":
            for block in self._blocks():
                block.recompute_attention()
        if spec.is_tied and self.has_embedding and self.has_head:
            self.head.share(self.embedding.weight)

    @property
    def has_embedding(self) -> bool:
        return self.first == 0

    @property
    def has_head(self) -> bool:
        return self.end == len(self.spec.layers) + 2

    @property
    def embedding(self) -> Embedding:
        return self.layers["0"]  # type: ignore[return-value]

    @property
    def head(self) -> Head:
        return self.layers[str(self.end - 1)]  # type: ignore[return-value]

    @property
    def tied_copy(self) -> nn.Parameter | None:
        """This stage's copy of a tied matrix whose other copy is on another stage, else None.

        The gradients of both copies are to be summed, so that they stay equal.
        """
        if not self.spec.is_tied or self.has_embedding == self.has_head:
            return None
        return self.embedding.weight if self.has_embedding else self.head.weight

    def forward(self, x_RTD: Tensor | None, batch: MicroBatch) -> Tensor:
        """Return hidden states [R, T, D], or with the head the SUM of token losses, float32.

        `x_RTD`: hidden states of the layer before; None for the chunk with the embedding. `batch`
        is on this stage's device.
        """
        x = self.hidden(x_RTD, batch)
        if self.has_head:
            return self.head(x, batch)
        if torch.is_grad_enabled() and not x.requires_grad:
            # A frozen embedding (LoRA): who runs a pipeline asks each stage for a backward pass.
            x.requires_grad_()
        return x

    def logits(self, x_RTD: Tensor | None, batch: MicroBatch) -> Tensor:
        """Return logits [R, T, V], float32; the chunk must have the head."""
        return self.head.logits(self.hidden(x_RTD, batch))

    def hidden(self, x_RTD: Tensor | None, batch: MicroBatch) -> Tensor:
        """Return the residual stream behind the last block of this chunk: [R, T, D]."""
        if self.has_embedding:
            x_RTD = self.embedding(batch.ids)
        if x_RTD is None:
            raise UserError(f"the chunk from layer {self.first} on needs hidden states")
        x = x_RTD.to(self.dtype)
        context = Context(batch, self._rope)
        for block in self._blocks():
            if self.recompute == "full" and torch.is_grad_enabled():
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return x

    def layer_parameters(self, layer: int) -> dict[str, nn.Parameter]:
        """Return the parameters of a plan layer by full name, frozen ones too.

        A head that shares the embedding's matrix names it as well: as its own.
        """
        module = self._at(layer)
        named = module.named_parameters(remove_duplicate=False)
        return {module.prefix + name: parameter for name, parameter in named}

    def layer_cuts(self, layer: int) -> dict[str, Cut]:
        """Return how the parameters of a plan layer are cut over the team, by full name."""
        module = self._at(layer)
        return {
            f"{module.prefix}{path}.{name}": cut
            for path, part in module.named_modules()
            for name, cut in getattr(part, "cuts", {}).items()
        }

    def part_of(self, layer: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what this rank holds of a layer's weights or of their optimizer state.

        Raises: UserError for a tensor of another shape than the model's.
        """
        team, cuts = self.team, self.layer_cuts(layer)
        if team is None:
            return dict(state)
        found: dict[str, Tensor] = {}
        for name, tensor in state.items():
            cut = cut_of(cuts, name)
            if cut is None:
                found[name] = tensor
                continue
            want = sum(cut.widths) * team.size
            if tensor.ndim <= cut.dim or tensor.shape[cut.dim] != want:
                raise UserError(
                    f"{name} of layer {layer} is {tuple(tensor.shape)}, not {want} along dim"
                    f" {cut.dim}"
                )
            found[name] = cut.part(tensor, team.index, team.size)
        return found

    def whole_of(self, layer: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state with the parts of all ranks joined; the whole team calls it together."""
        team, cuts = self.team, self.layer_cuts(layer)
        found = dict(state)
        if team is not None:
            for name, tensor in state.items():
                if (cut := cut_of(cuts, name)) is not None:
                    found[name] = cut.whole(team.gather(tensor))
        return found

    def layer_state(self, layer: int, *, trainable_only: bool = False) -> dict[str, Tensor]:
        """Return parameters and buffers of a plan layer by full name, not copied.

        `trainable_only`: what training changes; under LoRA the adapters alone.
        """
        module = self._at(layer)
        state = {
            name: parameter.data
            for name, parameter in self.layer_parameters(layer).items()
            if parameter.requires_grad or not trainable_only
        }
        if trainable_only:
            return state
        return state | {module.prefix + name: buffer for name, buffer in module.named_buffers()}

    @torch.no_grad()
    def load_layer_state(
        self, layer: int, state: Mapping[str, Tensor], *, trainable_only: bool = False
    ) -> None:
        """Copy what `layer_state` gives into a plan layer, cast to this stage's dtype.

        Raises: UserError when names or shapes are not those of the layer.
        """
        own = self.layer_state(layer, trainable_only=trainable_only)
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra:
            what = f"lacks {missing[:3]}" if missing else f"has unknown {extra[:3]}"
            raise UserError(f"the state for layer {layer} {what}")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise UserError(
                    f"{name} of layer {layer} is {tuple(state[name].shape)},"
                    f" the model's is {tuple(tensor.shape)}"
                )
            tensor.copy_(state[name])

    def _blocks(self) -> Iterator[Block]:
        return (layer for layer in self.layers.values() if isinstance(layer, Block))

    def _at(self, layer: int) -> PlanLayer:
        if not self.first <= layer < self.end:
            raise UserError(f"layer {layer} is not on this stage ({self.first} to {self.end - 1})")
        return self.layers[str(layer)]  # type: ignore[return-value]


def _layer(spec: DecoderSpec, names: Names, index: int, make: Make) -> PlanLayer:
    if index == 0:
        return Embedding(spec, names, make)
    if index == len(spec.layers) + 1:
        return Head(spec, names, make)
    return Block(spec, spec.layers[index - 1], names, index - 1, make)
