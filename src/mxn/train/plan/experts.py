"""Experts shared out over neighbouring pipelines. Start at `exchange_s`.

With `expert_parallel` e, pipelines 0 … e - 1 hold the experts of a layer together, e … 2e - 1 the
next copy, and so on: each keeps an e-th of them and sends its tokens to where their experts are.
Takes tokens as spread evenly over the experts; does not know routing.
"""

from __future__ import annotations

from mxn.errors import UserError
from mxn.train.plan.cluster import Cluster, Link
from mxn.train.plan.links import slowest
from mxn.train.plan.plan import Stage, TrainPlan
from mxn.train.plan.shape import LayerShape, ModelShape


def has_experts(layer: LayerShape) -> bool:
    return layer.kind.startswith("block.moe") and layer.active_params is not None


def held_params(layer: LayerShape, expert_parallel: int) -> float:
    """Return the parameters of a layer that one pipeline holds.

    What a token uses is taken as held by all, though a part of it is experts: the shape does not
    tell them apart. So this is at most that part too much.
    """
    if expert_parallel == 1 or not has_experts(layer) or layer.active_params is None:
        return layer.params
    return layer.active_params + (layer.params - layer.active_params) / expert_parallel


def exchange_s(
    plan: TrainPlan, pipeline: int, stage: Stage, shape: ModelShape, cluster: Cluster
) -> float:
    """Return the seconds per micro-batch and pass that a stage's tokens travel to experts and back.

    There and back for each layer with experts, over the slowest link to a stage that shares them;
    a token goes to `routed_to` experts, (e - 1)/e of which are elsewhere. 0 without sharing.
    Raises: UserError for pipelines that share experts but cut the model differently.
    """
    count = plan.expert_parallel
    if count == 1:
        return 0.0
    _check(plan)
    layers = [
        layer
        for chunk in stage.chunks
        for layer in shape.layers[chunk.first : chunk.end]
        if has_experts(layer)
    ]
    if not layers:
        return 0.0
    tokens = plan.micro_batch * plan.seq_tokens / stage.tp
    away = (count - 1) / count
    link = _slowest_peer(plan, pipeline, stage, cluster)
    return sum(
        2 * link.transfer_s(layer.output_bytes * layer.routed_to * tokens * away)
        for layer in layers
    )


def _check(plan: TrainPlan) -> None:
    count = plan.expert_parallel
    if count < 1 or len(plan.pipelines) % count:
        raise UserError(
            f"{len(plan.pipelines)} pipelines cannot share experts in groups of {count}",
            hint="expert_parallel must divide the number of pipelines",
        )


def _slowest_peer(plan: TrainPlan, pipeline: int, stage: Stage, cluster: Cluster) -> Link:
    first = pipeline - pipeline % plan.expert_parallel
    links: list[Link] = []
    for other in plan.pipelines[first : first + plan.expert_parallel]:
        peer = next((s for s in other.stages if s.chunks == stage.chunks), None)
        if peer is None:
            raise UserError(
                f"pipelines {first} to {first + plan.expert_parallel - 1} share experts "
                "but cut the model differently",
                hint="give them the same layers per stage, or expert_parallel 1",
            )
        if (peer.group, peer.first_device) != (stage.group, stage.first_device):
            links.append(
                cluster.link(stage.group, stage.first_device, peer.group, peer.first_device)
            )
    chosen = slowest(links, 1e6)
    assert chosen is not None, "a group of at least two pipelines has a peer"
    return chosen
