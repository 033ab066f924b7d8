"""Cluster files: the groups of a job and their links, as TOML. Start at `read_cluster`.

    default_link = { gb_per_s = 10, latency_us = 20, basis = "assumed" }   # between groups

    [[group]]
    name = "amd"                       # default: the chip's name
    chip = "amd-mi210"                 # of the catalogue: `mxn chips specs`
    devices = 128
    devices_per_node = 8
    node_link = { gb_per_s = 150 }     # inside a node; default: from the catalogue
    group_link = { gb_per_s = 25 }     # between the nodes of the group
    memory = "58GiB"                   # that a process may use; default: 92 % of the catalogue's
    peak_tflop_per_s = 181             # dense, in the dtype of the job; default: the catalogue's
    watts = 300                        # of a busy device; default: the catalogue's limit
    price_per_hour = 1.20              # of a device

    [[link]]
    between = ["amd", "ascend"]
    gb_per_s = 3
    latency_us = 50

What neither the file nor the catalogue knows stays None and is said in `ClusterFile.notes`; a link
that nobody knows is an error. Pure: text and catalogue come in as arguments.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from mxn.chips.specs import BASES, Spec
from mxn.errors import ConfigError
from mxn.train.plan.cluster import Cluster, DeviceGroup, Link
from mxn.units import parse_bytes

USABLE_SHARE = 0.92  # of a device's memory, when the file does not say: drivers keep the rest
NODE_LATENCY_S = 10e-6  # Calculon's description of an A100 node and of InfiniBand
NETWORK_LATENCY_S = 20e-6
_GROUP_KEYS = (
    "name", "chip", "devices", "devices_per_node", "node_link", "group_link", "memory",
    "peak_tflop_per_s", "watts", "price_per_hour",
)  # fmt: skip
_LINK_KEYS = ("gb_per_s", "latency_us", "basis")
_DTYPES = ("bf16", "fp16")  # of mixed-precision training, the first that the catalogue knows


@dataclass(frozen=True, slots=True)
class ClusterFile:
    cluster: Cluster
    notes: tuple[str, ...]  # what was assumed, and what nobody knows


def read_cluster(text: str, where: str, specs: Mapping[str, Spec]) -> ClusterFile:
    """Return the cluster that a TOML text describes; `specs` is `mxn.chips.specs.all_specs()`.

    Raises: ConfigError with `where`, the line and the nearest name.
    """
    return _Reader(text, where, specs).read()


class _Reader:
    def __init__(self, text: str, where: str, specs: Mapping[str, Spec]) -> None:
        self._lines = text.splitlines()
        self._text = text
        self._where = where
        self._specs = specs
        self._notes: list[str] = []
        self._at = 0  # line of the table that is being read

    def read(self) -> ClusterFile:
        try:
            data = tomllib.loads(self._text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{self._where}: not valid TOML: {error}") from error
        self._known(data, ("group", "link", "default_link"), "a cluster file")
        tables = self._tables(data, "group")
        if not tables:
            raise self._error("there is no [[group]]", hint="give one for each chip of the job")
        groups: list[DeviceGroup] = []
        for number, table in enumerate(tables):
            self._at = self._line_of_table("group", number)
            groups.append(self._group(table, [group.name for group in groups]))
        links = self._links(data, [group.name for group in groups])
        return ClusterFile(Cluster(groups=tuple(groups), links=links), tuple(self._notes))

    def _group(self, table: dict[str, Any], taken: list[str]) -> DeviceGroup:
        self._known(table, _GROUP_KEYS, "[[group]]")
        spec = self._spec(table)
        name = self._string(table, "name", spec.name)
        if name in taken:
            raise self._error(f"two groups are named {name!r}", "name")
        devices = self._count(table, "devices")
        per_node = self._count(table, "devices_per_node")
        node_link = self._node_link(table, spec, name, per_node)
        peak = self._peak(table, spec, name)
        watts = self._watts(table, spec, name)
        price = self._positive(table, "price_per_hour")
        return DeviceGroup(
            name=name, chip=spec.name, num_devices=devices, devices_per_node=per_node,
            memory_bytes=self._memory(table, spec, name), node_link=node_link,
            group_link=self._group_link(table, devices, per_node, node_link),
            peak_flop_per_s=peak, watts=watts,
            price_micro_per_hour=None if price is None else round(price * 1e6),
        )  # fmt: skip

    def _spec(self, table: dict[str, Any]) -> Spec:
        chip = self._string(table, "chip", None)
        if chip not in self._specs:
            raise self._error(
                f"unknown chip {chip!r}", "chip", hint=_nearest(chip, self._specs, "chips specs")
            )
        return self._specs[chip]

    def _memory(self, table: dict[str, Any], spec: Spec, name: str) -> int:
        if "memory" in table:
            try:
                return parse_bytes(table["memory"])
            except (ValueError, TypeError) as error:
                raise self._error(str(error), "memory") from error
        known = spec.best("memory")
        if known is None:
            raise self._error(
                f"the memory of {spec.name!r} is unknown", "chip", hint='add memory = "…GiB"'
            )
        self._notes.append(
            f"{name}: {USABLE_SHARE:.0%} of {known.value / 1e9:g} GB ({known.basis}) may be used"
        )
        return int(known.value * USABLE_SHARE)

    def _peak(self, table: dict[str, Any], spec: Spec, name: str) -> float | None:
        given = self._positive(table, "peak_tflop_per_s")
        if given is not None:
            return given * 1e12
        for dtype in _DTYPES:
            figures = spec.all(dtype)
            known = spec.best(dtype) or (figures[0] if figures else None)
            if known is not None:
                self._notes.append(f"{name}: {dtype} {known.value:g} TFLOP/s ({known.basis})")
                return known.value * 1e12
        self._notes.append(f"{name}: the peak is unknown, so MFU is")
        return None

    def _watts(self, table: dict[str, Any], spec: Spec, name: str) -> float | None:
        given = self._positive(table, "watts")
        if given is not None:
            return given
        known = spec.best("power")
        if known is None:
            self._notes.append(f"{name}: watts are unknown, so energy is")
            return None
        self._notes.append(f"{name}: {known.value:g} W ({known.basis}, a limit)")
        return known.value

    def _node_link(self, table: dict[str, Any], spec: Spec, name: str, per_node: int) -> Link:
        if "node_link" in table:
            return self._link(table["node_link"], "node_link", NODE_LATENCY_S)
        measured = spec.all("all-reduce")
        if measured:
            rate, how = measured[0].value, f"all-reduce, {measured[0].basis}"
        elif (peak := spec.best("link")) is not None:
            rate, how = peak.value / 2, f"half of {peak.value:g} both ways, {peak.basis}"
        elif per_node == 1:
            rate, how = 1.0, "unused: one device in a node"
        else:
            raise self._error(
                f"the link between {spec.name!r} devices is unknown", "chip",
                hint="add node_link = { gb_per_s = … }",
            )  # fmt: skip
        self._notes.append(f"{name}: {rate:g} GB/s inside a node ({how})")
        basis = measured[0].basis if measured else "assumed"
        return Link(latency_s=NODE_LATENCY_S, bytes_per_s=rate * 1e9, basis=basis)

    def _group_link(
        self, table: dict[str, Any], devices: int, per_node: int, node_link: Link
    ) -> Link:
        if "group_link" in table:
            return self._link(table["group_link"], "group_link", NETWORK_LATENCY_S)
        if devices > per_node:
            raise self._error(
                f"{devices} devices are more than a node of {per_node}, and the link between "
                "nodes is not given", "devices", hint="add group_link = { gb_per_s = … }",
            )  # fmt: skip
        return node_link

    def _links(self, data: dict[str, Any], names: list[str]) -> dict[tuple[str, str], Link]:
        links: dict[tuple[str, str], Link] = {}
        for number, table in enumerate(self._tables(data, "link")):
            self._at = self._line_of_table("link", number)
            self._known(table, (*_LINK_KEYS, "between"), "[[link]]")
            pair = table.get("between")
            if not (isinstance(pair, list) and len(pair) == 2 and len(set(map(str, pair))) == 2):
                raise self._error(f"between is {pair!r}, expected two groups", "between")
            for name in pair:
                if name not in names:
                    raise self._error(
                        f"unknown group {name!r}", "between", hint=_nearest(name, names)
                    )
            rest = {key: value for key, value in table.items() if key != "between"}
            links[pair[0], pair[1]] = self._link(rest, "between", NETWORK_LATENCY_S)
        self._at = 0
        for pair in combinations(names, 2):
            if pair not in links and pair[::-1] not in links:
                if "default_link" not in data:
                    raise self._error(
                        f"the link between {pair[0]!r} and {pair[1]!r} is not given",
                        hint="add a [[link]], or default_link for all pairs",
                    )
                links[pair] = self._link(data["default_link"], "default_link", NETWORK_LATENCY_S)
        return links

    def _link(self, table: Any, key: str, latency_s: float) -> Link:
        if not isinstance(table, dict):
            raise self._error(f"{key} is {table!r}, expected {{ gb_per_s = … }}", key)
        self._known(table, _LINK_KEYS, key, line_key=key)
        rate = self._positive(table, "gb_per_s", line_key=key)
        if rate is None:
            raise self._error(f"{key} has no gb_per_s", key)
        latency_us = table.get("latency_us", latency_s * 1e6)
        if not isinstance(latency_us, int | float) or latency_us < 0:
            raise self._error(f"latency_us is {latency_us!r}, expected 0 or more", key)
        basis = table.get("basis", "assumed")
        if basis not in BASES:
            raise self._error(f"unknown basis {basis!r}", key, hint=_nearest(basis, BASES))
        return Link(latency_s=latency_us * 1e-6, bytes_per_s=rate * 1e9, basis=basis)

    def _tables(self, data: dict[str, Any], key: str) -> list[dict[str, Any]]:
        tables = data.get(key, [])
        if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
            raise self._error(f"{key!r} is not a list of tables", key, hint=f"write [[{key}]]")
        return tables

    def _known(
        self, table: dict[str, Any], keys: Collection[str], what: str, line_key: str | None = None
    ) -> None:
        for key in table:
            if key not in keys:
                raise self._error(
                    f"unknown key {key!r} in {what}", line_key or key, hint=_nearest(key, keys)
                )

    def _string(self, table: dict[str, Any], key: str, default: str | None) -> str:
        value = table.get(key, default)
        if not isinstance(value, str) or not value:
            raise self._error(f"{key} is {value!r}, expected a name", key)
        return value

    def _count(self, table: dict[str, Any], key: str) -> int:
        value = table.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(f"{key} is {value!r}, expected a whole number of at least 1", key)
        return value

    def _positive(
        self, table: dict[str, Any], key: str, line_key: str | None = None
    ) -> float | None:
        value = table.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self._error(f"{key} is {value!r}, expected more than 0", line_key or key)
        return float(value)

    def _line_of_table(self, name: str, number: int) -> int:
        """Return the index of the `number`-th [[name]] line."""
        at = [
            i for i, line in enumerate(self._lines) if re.match(rf"\s*\[\[\s*{name}\s*\]\]", line)
        ]
        return at[number] if number < len(at) else 0

    def _error(
        self, message: str, key: str | None = None, *, hint: str | None = None
    ) -> ConfigError:
        """Return an error that points at `key` in the table that is being read."""
        line = self._at
        for i in range(self._at, len(self._lines)) if key else ():
            if i > self._at and re.match(r"\s*\[", self._lines[i]) and self._at:
                break
            if re.match(rf"""\s*["']?{re.escape(str(key))}["']?\s*=""", self._lines[i]):
                line = i
                break
        return ConfigError(f"{self._where}:{line + 1}: {message}", hint=hint)


def _nearest(name: object, names: Collection[str], command: str | None = None) -> str:
    near = difflib.get_close_matches(str(name), names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"`mxn {command}` lists them" if command else f"one of: {', '.join(names)}"
