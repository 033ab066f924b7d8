"""Makes the copies of a layer that several pipelines hold the same bits again.

All copies get the same gradients, bit for bit. Chips of different makers then round the steps of
AdamW differently, and copies drift apart by float noise that nothing pulls back. So at the start
and before each checkpoint one copy, masters and moments, is given to the others: what goes on is
what a restart from that checkpoint would go on with. Copies on chips that are alike are left alone.
Weights that are further apart than float noise stop the job. Knows the optimizers and the bridge;
knows no checkpoints. Start at `Replicas.align`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mxn.errors import UserError
from mxn.train.run.bridge import Bridge
from mxn.train.run.net import StageModule
from mxn.train.run.optim import AdamW
from mxn.train.run.placement import Placement, Team

BUDGET = 1e-4
"""RMS of the difference of weights over their RMS. Thousands of steps of float noise stay below a
tenth of it; a chip that updates 1 % wrong is above it within a hundred."""


class Replicas:
    """One rank's copies. All ranks make one, and `align` together."""

    def __init__(
        self,
        placement: Placement,
        bridge: Bridge,
        modules: Sequence[StageModule],
        optimizers: Sequence[AdamW],
        *,
        dtypes: Sequence[torch.dtype],
    ) -> None:
        """`dtypes` by rank: masters of other roundings begin apart."""
        self._placement, self._bridge, self._dtypes = placement, bridge, dtypes
        self._chunks = list(zip(modules, optimizers, strict=True))
        self._is_tied = modules[0].spec.is_tied
        layers = range(placement.plan.num_layers)
        together = [*([layer] for layer in layers), [layers[0], layers[-1]]]
        self._is_mixed = any(
            self._differ(ranks)
            for some in together[: None if self._is_tied else -1]
            for ranks in placement.sharers(some)
        )

    @torch.no_grad()
    def align(self, *, judge: bool = True) -> float | None:
        """Give one copy to the others; return how far apart weights were at most, on any rank.

        None where no layer is held by different chips; nothing is sent then.
        Raises: UserError, on all ranks, naming rank and layer, for more than `BUDGET` if `judge`;
        PeerError.
        """
        if not self._is_mixed:
            return None
        found = [(0.0, 0), *(self._align(*where) for where in self._shared())]
        found.append((self._align_tied(), 0))
        for _, optimizer in self._chunks:
            optimizer.round_weights()
        rows = self._bridge.gather([*max(found)])
        apart = max(row[0] for row in rows)
        if judge and not apart <= BUDGET:
            rank = next(rank for rank, row in enumerate(rows) if not row[0] <= BUDGET)
            raise UserError(
                f"weights of layer {rows[rank][1]:.0f} on {self._bridge.members[rank].name} are "
                f"{rows[rank][0]:.1e} away from their copy on another chip; rounding explains "
                f"{BUDGET:g}",
                hint="one of the chips does not compute what it must: the parity gate says which "
                "operator (gate: {parity: true}); leave its group out",
            )
        return apart

    def _shared(self) -> Iterator[tuple[int, StageModule, AdamW, Team]]:
        """Yield the layers that this rank holds together with another chip, and those ranks."""
        if self._placement.plan.shards_optimizer:
            return  # weights have one owner, who gives them to the others in each step
        for module, optimizer in sorted(self._chunks, key=lambda chunk: chunk[0].first):
            for layer in range(module.first, module.end):
                ranks = self._mine(self._placement.sharers([layer]))
                if self._differ(ranks):
                    yield layer, module, optimizer, ranks

    def _align(
        self, layer: int, module: StageModule, optimizer: AdamW, ranks: Team
    ) -> tuple[float, int]:
        tied = {id(parameter) for parameter, _ in self._tied()}
        names = module.layer_parameters(layer)
        own: dict[str, Tensor] = {
            name: tensor
            for name, tensor in optimizer.layer_state(layer).items()
            if id(names[name.rpartition(".")[0]]) not in tied
        }
        # Teams of several sizes hold other parts: they meet as whole tensors.
        is_whole = len({len(team) for team in self._placement.teams_with(layer)}) > 1
        given = self._given(module.whole_of(layer, own) if is_whole else own, ranks)
        return _take(own, module.part_of(layer, given) if is_whole else given), layer

    def _align_tied(self) -> float:
        """The matrix that embedding and head share is one tensor over all ranks with either."""
        layers = [0, self._placement.plan.num_layers - 1]
        tied = self._tied()
        if not tied or not self._differ(ranks := self._mine(self._placement.sharers(layers))):
            return 0.0
        states = [optimizer.state_of(parameter) for parameter, optimizer in tied]
        given = self._given(states[0], ranks)
        return max(_take(state, given) for state in states)

    def _tied(self) -> list[tuple[Tensor, AdamW]]:
        """Return this rank's trained copies of the tied matrix, each with its optimizer."""
        found: dict[int, tuple[Tensor, AdamW]] = {}
        for module, optimizer in self._chunks if self._is_tied else []:
            copies = [module.embedding.weight] if module.has_embedding else []
            copies += [module.head.weight] if module.has_head else []
            found |= {id(copy): (copy, optimizer) for copy in copies if copy.requires_grad}
        return list(found.values())

    def _given(self, state: Mapping[str, Tensor], ranks: Team) -> dict[str, Tensor]:
        """Return the state of the first of `ranks`, which all of them call with the same names."""
        names = sorted(state)
        if not names:
            return {}
        flat = torch.cat([state[name].reshape(-1) for name in names])
        if self._bridge.rank != ranks[0]:
            flat.zero_()
        flat = self._bridge.sum_(flat, ranks, is_exact=True).wait()  # the one beside zeros
        pieces = flat.split([state[name].numel() for name in names])
        return {name: piece.view_as(state[name]) for name, piece in zip(names, pieces, strict=True)}

    def _mine(self, sets: Sequence[Team]) -> Team:
        return next((ranks for ranks in sets if self._bridge.rank in ranks), ())

    def _differ(self, ranks: Team) -> bool:
        kinds = {(self._bridge.members[rank].chip, self._dtypes[rank]) for rank in ranks}
        return len(kinds) > 1


def _take(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> float:
    """Overwrite a state; return how far its weights were from the given ones, as a share.

    Infinity where a weight of either is no finite number.
    """
    apart = 0.0
    for name, tensor in own.items():
        if name.endswith("master"):
            off = torch.linalg.vector_norm(tensor - given[name]).item()
            size = torch.linalg.vector_norm(given[name]).item()
            share = off / size if size else off
            # Comparisons with NaN are False: `max` would pass over it.
            apart = max(apart, share if math.isfinite(off + size) else math.inf)
        tensor.copy_(given[name])
    return apart
