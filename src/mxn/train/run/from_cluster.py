"""From a model and a cluster that nobody has to a `Task`. Start at `task_of_cluster`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mxn.errors import NotFoundError
from mxn.train.plan.memory import FLOAT32, MIXED
from mxn.train.plan.profile import ChipProfile
from mxn.train.plan.search.choices import Limits
from mxn.train.run.prepare import Task

_MICRO_BATCHES = (1, 2, 4, 8)  # looked at when nobody says


def task_of_cluster(
    model: Path,
    cluster: str,
    *,
    seq_tokens: int,
    rows: int,
    micro_batches: Sequence[int] = (),
    dtype: str = "bfloat16",
) -> Task:
    """Return the task of training the model of a config.json on a cluster that nobody has.

    `cluster` is a TOML file or the name of a preset; `model` is a folder with a config.json, or
    that file. Needs no hardware and no weights.
    Raises: ConfigError with the line of the cluster file; UnsupportedError for the model.
    """
    from mxn.chips.specs import all_specs
    from mxn.train.plan.analytic import derive_profile, numbers_of
    from mxn.train.plan.clusters import read_cluster
    from mxn.train.shapes import read_shape

    folder = model.parent if model.is_file() else model
    shape = read_shape(folder, seq_tokens=seq_tokens, dtype=dtype)
    described = read_cluster(_cluster_text(cluster), cluster, all_specs())
    sizes = tuple(micro_batches) or tuple(size for size in _MICRO_BATCHES if rows % size == 0)
    profiles: dict[str, ChipProfile] = {}
    for group in described.cluster.groups:
        numbers = numbers_of(
            all_specs()[group.chip], dtype=_SHORT[dtype], tensor_link=group.node_link
        )
        profiles[group.chip] = derive_profile(
            numbers, shape, sizes, _widths(group.devices_per_node)
        )
    return Task(
        shape=shape, rows=rows, cluster=described.cluster, profiles=profiles,
        memory=FLOAT32 if dtype == "float32" else MIXED, limits=Limits(),
        notes=described.notes,
    )  # fmt: skip


_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _widths(devices_per_node: int) -> list[int]:
    return [width for width in (1, 2, 4, 8, 16) if width <= devices_per_node]


def _cluster_text(cluster: str) -> str:
    from mxn.train.plan.simulated import PRESETS

    if cluster in PRESETS:
        return PRESETS[cluster]
    path = Path(cluster)
    if not path.is_file():
        raise NotFoundError(
            f"no cluster file {cluster!r}", hint=f"name a TOML file, or {', '.join(PRESETS)}"
        )
    return path.read_text(encoding="utf-8")
