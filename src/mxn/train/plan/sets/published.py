"""Published homogeneous runs as cases: what a derived profile should come near. Start at `CASES`.

Sources: Korthikanti et al. 2022 (2205.05198, table 5); FlagPerf's result pages. The links between
nodes are the usual ones of such machines and are assumed; the runs do not state them.
"""

from __future__ import annotations

from dataclasses import dataclass

from mxn.train.plan.cluster import Cluster, DeviceGroup, Link
from mxn.train.plan.plan import Chunk, Pipeline, Recompute, Schedule, Stage, TrainPlan
from mxn.train.plan.shape import LayerShape, ModelShape

_NODE = 8
_INTER = Link(latency_s=2e-5, bytes_per_s=22.5e9, basis="assumed")  # 200 Gbit/s a device, 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One run. `measured_s` is of a step, derived from tokens/s where those were published."""

    name: str
    source: str
    chip: str
    shape: ModelShape
    plan: TrainPlan
    measured_s: float

    def cluster(self, memory_bytes: int, peak_flop_per_s: float, node_link: Link) -> Cluster:
        """Return the machines of the run: nodes of eight."""
        group = DeviceGroup(
            name="all",
            chip=self.chip,
            num_devices=self.plan.num_devices,
            devices_per_node=_NODE,
            memory_bytes=memory_bytes,
            node_link=node_link,
            group_link=_INTER,
            peak_flop_per_s=peak_flop_per_s,
        )
        return Cluster(groups=(group,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """A model's sizes. `gated`: three matrices in the MLP; `kv_share`: of keys to queries."""

    name: str
    blocks: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int
    seq: int
    gated: bool = False
    kv_share: float = 1.0
    fused_attention: bool = False  # scores never reach memory

    def shape(self) -> ModelShape:
        """Return the row of layers: embedding, blocks, head; 16-bit activations."""
        h, seq = self.hidden, self.seq
        weights = int(h * h * (2 + 2 * self.kv_share) + h * self.ffn * (3 if self.gated else 2))
        scores = 0.0 if self.fused_attention else 5.0 * self.heads * seq
        block = LayerShape(
            kind="block",
            params=weights + 2 * h,
            forward_flop=2.0 * weights + 4.0 * seq * h,
            activation_bytes=34.0 * h + scores,
            output_bytes=2.0 * h,
        )
        embedding = LayerShape(
            kind="embedding",
            params=self.vocabulary * h,
            forward_flop=0.0,
            activation_bytes=2.0 * h,
            output_bytes=2.0 * h,
        )
        head = LayerShape(
            kind="head",
            params=self.vocabulary * h,
            forward_flop=2.0 * h * self.vocabulary,
            activation_bytes=6.0 * self.vocabulary,
            output_bytes=4.0,
        )
        layers = (embedding, *([block] * self.blocks), head)
        return ModelShape(name=self.name, layers=layers, seq_tokens=seq)


def grid(
    shape: ModelShape,
    *,
    tp: int,
    pp: int,
    dp: int,
    micro_batch: int,
    micro_batches: int,
    chunks: int = 1,
    recompute: Recompute = "none",
    shards_optimizer: bool = False,
) -> TrainPlan:
    """Return the usual even plan; `micro_batches` are of each of the `dp` pipelines.

    Blocks are cut evenly over pp · chunks parts, the first ones a block longer where it must be.
    """
    blocks, parts = shape.num_layers - 2, pp * chunks
    ends = [1 + (blocks * (i + 1)) // parts for i in range(parts)]
    ends[-1] += 1
    cuts = [0, *ends]
    pipelines = tuple(
        Pipeline(
            stages=tuple(
                Stage(
                    group="all",
                    first_device=(s * dp + p) * tp,
                    tp=tp,
                    recompute=recompute,
                    chunks=tuple(
                        Chunk(first=cuts[c * pp + s], end=cuts[c * pp + s + 1])
                        for c in range(chunks)
                    ),
                )
                for s in range(pp)
            ),
            micro_batches=micro_batches,
        )
        for p in range(dp)
    )
    schedule: Schedule = "interleaved" if chunks > 1 else "1f1b"
    return TrainPlan(
        model=shape.name,
        num_layers=shape.num_layers,
        seq_tokens=shape.seq_tokens,
        micro_batch=micro_batch,
        pipelines=pipelines,
        schedule=schedule,
        shards_optimizer=shards_optimizer,
    )


def _korthikanti() -> list[Published]:
    rows = (
        ("22B", 48, 6144, 64, 1, 1, 1, 4, 1.42, 1.10),
        ("175B", 96, 12288, 96, 8, 3, 64, 1, 18.13, 13.75),
        ("530B", 105, 20480, 128, 35, 3, 280, 1, 49.05, 37.83),
        ("1T", 128, 25600, 160, 64, 1, 512, 1, 94.42, 71.49),
    )
    found: list[Published] = []
    for name, blocks, hidden, heads, pp, chunks, count, mbs, full_s, selective_s in rows:
        shape = Transformer(
            name=f"gpt-{name}",
            blocks=blocks,
            hidden=hidden,
            heads=heads,
            ffn=4 * hidden,
            vocabulary=51200,
            seq=2048,
        ).shape()
        pairs: tuple[tuple[Recompute, float], ...] = (("full", full_s), ("selective", selective_s))
        for recompute, seconds in pairs:
            plan = grid(
                shape,
                tp=8,
                pp=pp,
                dp=1,
                micro_batch=mbs,
                micro_batches=count,
                chunks=chunks,
                recompute=recompute,
            )
            found.append(
                Published(
                    name=f"GPT {name}, {recompute} recomputation",
                    source="2205.05198",
                    chip="nvidia-a100-80g",
                    shape=shape,
                    plan=plan,
                    measured_s=seconds,
                )
            )
    return found


_LLAMA3_8B = Transformer(
    name="llama3-8b", blocks=32, hidden=4096, heads=32, ffn=14336, vocabulary=128256, seq=8192,
    gated=True, kv_share=0.25, fused_attention=True,
)  # fmt: skip
_LLAMA2_7B = Transformer(
    name="llama2-7b", blocks=32, hidden=4096, heads=32, ffn=11008, vocabulary=32000, seq=4096,
    gated=True, fused_attention=True,
)  # fmt: skip
_LLAMA2_70B = Transformer(
    name="llama2-70b", blocks=80, hidden=8192, heads=64, ffn=28672, vocabulary=32000, seq=4096,
    gated=True, kv_share=0.125, fused_attention=True,
)  # fmt: skip


def _flagperf() -> list[Published]:
    """Return FlagPerf's rows. Micro-batches per step are assumed: 64 rows per pipeline."""
    rows = (
        ("Llama3-8B, 8 A100, PP2 DP4", "nvidia-a100-80g", _LLAMA3_8B, 1, 2, 4, 3698.7),
        ("Llama3-8B, 8 H100, TP2 DP4", "nvidia-h100", _LLAMA3_8B, 2, 1, 4, 8103.0),
        ("Llama2-7B, 8 A800, DP8", "nvidia-a800-80g", _LLAMA2_7B, 1, 1, 8, 4047.0),
        ("Llama2-70B, 32 H800, TP8 PP4", "nvidia-h800", _LLAMA2_70B, 8, 4, 1, 642.0),
        ("Llama2-70B, 32 H800, TP4 PP8", "nvidia-h800", _LLAMA2_70B, 4, 8, 1, 791.0),
    )
    found: list[Published] = []
    for name, chip, model, tp, pp, dp, rate in rows:
        shape = model.shape()
        plan = grid(
            shape,
            tp=tp,
            pp=pp,
            dp=dp,
            micro_batch=1,
            micro_batches=64,
            shards_optimizer=dp > 1,
        )
        found.append(
            Published(
                name=name,
                source="FlagPerf",
                chip=chip,
                shape=shape,
                plan=plan,
                measured_s=plan.tokens_per_step / (rate * plan.num_devices),
            )
        )
    return found


CASES: tuple[Published, ...] = (*_korthikanti(), *_flagperf())
