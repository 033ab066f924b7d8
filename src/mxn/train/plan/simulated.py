"""Clusters that nobody here has, for predictions only: cluster files as text. Start at `PRESETS`.

Chips are those of the catalogue, with its figures and their basis. Links are assumed and say so:
one 200 Gbit/s network card per device at 80 %, and 10 GB/s between makers, where data is staged
through hosts. Whatever is predicted from them has the basis `simulated`.
"""

from __future__ import annotations

_HEAD = """\
default_link = {{ gb_per_s = {between:g}, latency_us = 30, basis = "assumed" }}
"""
_GROUP = """
[[group]]
name = "{name}"
chip = "{chip}"
devices = {devices}
devices_per_node = 8
{node_link}group_link = {{ gb_per_s = 20, latency_us = 20, basis = "assumed" }}
"""

# Inside a node, in one direction. The catalogue's rate for an Ascend 910B is measured, that for a
# 910B3 an assumption; for a MetaX C500 it has none: PCIe 5 at 80 %.
_NODE_GB_PER_S = {"ascend-910b3": 72, "metax-c500": 50}

TWO_CHIPS = (("amd", "amd-mi210", 128), ("ascend", "ascend-910b3", 640))
"""128 AMD devices and 640 of another maker, the mix of HETHUB's largest run; which other chip that
was is not public."""

SIX_CHIPS = (
    ("amd", "amd-mi210", 128),
    ("ascend", "ascend-910b3", 320),
    ("iluvatar", "iluvatar-bi-v150", 128),
    ("metax", "metax-c500", 200),
    ("moorethreads", "moorethreads-s4000", 96),
    ("nvidia", "nvidia-a100-80g", 128),
)
"""A thousand devices of the six makers that HETHUB names."""


def cluster_text(
    groups: tuple[tuple[str, str, int], ...], *, between_gb_per_s: float = 10, scale: float = 1.0
) -> str:
    """Return a cluster file of (name, chip, devices); `scale` multiplies the nodes."""
    text = _HEAD.format(between=between_gb_per_s)
    for name, chip, devices in groups:
        text += _GROUP.format(
            name=name,
            chip=chip,
            devices=max(8, round(devices * scale / 8) * 8),
            node_link=_node_link(chip),
        )
    return text


def _node_link(chip: str) -> str:
    rate = _NODE_GB_PER_S.get(chip)
    if rate is None:
        return ""
    return f'node_link = {{ gb_per_s = {rate}, latency_us = 10, basis = "assumed" }}\n'


PRESETS = {"two-chips-768": cluster_text(TWO_CHIPS), "six-chips-1000": cluster_text(SIX_CHIPS)}
"""Cluster files by name."""
