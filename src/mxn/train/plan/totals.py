"""What a whole step amounts to: share of the peak, energy, money, and how far to trust it.

Knows a plan's devices and its seconds; does not know how the seconds were found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mxn.errors import UserError
from mxn.train.plan.cluster import Cluster
from mxn.train.plan.plan import TrainPlan
from mxn.train.plan.profile import Profiles
from mxn.train.plan.shape import ModelShape

_BASES = ("measured", "datasheet", "derived", "assumed", "simulated")  # strongest first


def weakest(bases: Sequence[str]) -> str:
    """Return the weakest of `bases`. Raises: UserError for a word that is no basis."""
    for basis in bases:
        if basis not in _BASES:
            raise UserError(f"{basis!r} is no basis", hint=f"one of: {', '.join(_BASES)}")
    return max(bases, key=_BASES.index)


def mfu(plan: TrainPlan, shape: ModelShape, cluster: Cluster, seconds: float) -> float | None:
    """Return useful work over what the plan's devices could do; None when a peak is unknown."""
    peak = _over_devices(plan, {g.name: g.peak_flop_per_s for g in cluster.groups})
    return None if not peak else shape.flop_per_token * plan.tokens_per_step / (seconds * peak)


def energy_j(plan: TrainPlan, cluster: Cluster, seconds: float) -> float | None:
    """Return the joules of the plan's devices, busy throughout; None when a power is unknown."""
    watts = _over_devices(plan, {g.name: g.watts for g in cluster.groups})
    return None if watts is None else watts * seconds


def cost_micro(plan: TrainPlan, cluster: Cluster, seconds: float) -> float | None:
    """Return the price of the plan's devices in micro-units; None when one has no price."""
    prices = {g.name: g.price_micro_per_hour for g in cluster.groups}
    price = _over_devices(plan, prices)
    return None if price is None else price * seconds / 3600


def _over_devices(plan: TrainPlan, value: Mapping[str, float | int | None]) -> float | None:
    """Return the sum of a group's `value` over the plan's devices; None when one is unknown."""
    total = 0.0
    for pipeline in plan.pipelines:
        for stage in pipeline.stages:
            one = value[stage.group]
            if one is None:
                return None
            total += one * stage.tp
    return total


def basis(plan: TrainPlan, cluster: Cluster, profiles: Profiles) -> str:
    """Return the weakest basis of the profiles, and of the links where there are any to cross."""
    names = sorted({stage.group for pipeline in plan.pipelines for stage in pipeline.stages})
    groups = [cluster.group(name) for name in names]
    bases = [profiles[group.chip].basis for group in groups]
    if plan.num_devices > 1:
        bases += [group.node_link.basis for group in groups if group.devices_per_node > 1]
        bases += [group.group_link.basis for group in groups if group.num_nodes > 1]
        bases += [link.basis for (a, b), link in cluster.links.items() if a in names and b in names]
    return weakest(bases)
