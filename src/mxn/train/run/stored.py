"""Measured profiles and links, one JSON file each under MXN_HOME/profiles, by fingerprint.

A fingerprint names everything a measurement depends on, so a file is either right or not asked for.
Files carry a checksum: one that was cut or changed is an error that names it, never a wrong plan.
Knows no devices and measures nothing. Start at `load_layers` and `load_link`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mxn import env
from mxn.errors import ConfigError
from mxn.train.plan.cluster import Link
from mxn.train.plan.profile import ChipProfile, LayerCost

SCHEMA = "mxn.train.profile/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One kind of layer at one micro-batch: what it costs, and how sure that is.

    `noise` is the half-width of the middle half of the repeats, as a share of the median, of
    forward and backward together; `error` the standard error of their mean over rounds, as a share
    of it, None where there was one round; `stopped` the number of repeats that were left out
    because the process stood still in them.
    """

    kind: str
    micro_batch: int
    tp: int
    cost: LayerCost
    noise: float
    repeats: int
    error: float | None = None
    stopped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredProfile:
    """All readings of one device under one set of conditions. `key` is what they depend on."""

    chip: str
    key: Mapping[str, Any]
    readings: tuple[Reading, ...]
    framework_bytes: float
    basis: str
    notes: tuple[str, ...] = field(default=())

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.key)

    def lacks(self, wanted: set[tuple[str, int, int]]) -> set[tuple[str, int, int]]:
        """Return the (kind, micro-batch, tp) that are wanted and not here."""
        return wanted - {(r.kind, r.micro_batch, r.tp) for r in self.readings}

    def with_readings(self, more: tuple[Reading, ...]) -> StoredProfile:
        """Return this profile with those of `more` whose cases it has not yet."""
        rows = {(r.kind, r.micro_batch, r.tp): r for r in (*more, *self.readings)}
        return replace(self, readings=tuple(rows[case] for case in sorted(rows)))

    def to_chip_profile(self) -> ChipProfile:
        """Return it as the planner reads it."""
        costs = {(r.kind, r.micro_batch, r.tp): r.cost for r in self.readings}
        return ChipProfile(
            chip=self.chip, costs=costs, framework_bytes=self.framework_bytes, basis=self.basis,
            fingerprint=self.fingerprint, notes=self.notes,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLink:
    """A measured link. `key` is what it depends on; `noise` as in a `Reading`, of the largest."""

    key: Mapping[str, Any]
    link: Link
    noise: float


def fingerprint(key: Mapping[str, Any]) -> str:
    """Return the 16 hex digits that name a set of conditions."""
    return _digest(key)[:16]


def folder() -> Path:
    """Return where profiles are kept; it exists."""
    path = env.home() / "profiles"
    path.mkdir(parents=True, exist_ok=True)
    return path


def layers_path(key: Mapping[str, Any]) -> Path:
    return folder() / f"layers-{fingerprint(key)}.json"


def link_path(key: Mapping[str, Any]) -> Path:
    return folder() / f"link-{fingerprint(key)}.json"


def store_layers(profile: StoredProfile) -> Path:
    """Keep a profile, replacing the one before it whole, and return where."""
    return _write(layers_path(profile.key), asdict(profile))


def store_link(stored: StoredLink) -> Path:
    return _write(link_path(stored.key), asdict(stored))


def load_layers(key: Mapping[str, Any]) -> StoredProfile | None:
    """Return what was measured under these conditions, or None. Raises: ConfigError, named file."""
    path = layers_path(key)
    body = _read(path)
    return None if body is None else _parse(path, body, _layers_of)


def load_link(key: Mapping[str, Any]) -> StoredLink | None:
    """Return the link measured under these conditions, or None. Raises: ConfigError, named file."""
    path = link_path(key)
    body = _read(path)
    return None if body is None else _parse(path, body, _link_of)


def _layers_of(body: dict[str, Any]) -> StoredProfile:
    readings = tuple(
        Reading(**row | {"cost": LayerCost(**row["cost"])}) for row in body["readings"]
    )
    return StoredProfile(**body | {"readings": readings, "notes": tuple(body["notes"])})


def _link_of(body: dict[str, Any]) -> StoredLink:
    points = tuple((float(size), float(seconds)) for size, seconds in body["link"]["points"])
    fields_: dict[str, Any] = body | {"link": Link(**body["link"] | {"points": points})}
    return StoredLink(**fields_)


# -- files -------------------------------------------------------------------------------------


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write(path: Path, body: dict[str, Any]) -> Path:
    body = json.loads(json.dumps(body))  # tuples become lists, as they will be read
    part = path.with_suffix(f".{os.getpid()}.part")
    document = {"schema": SCHEMA, "sha256": _digest(body), "body": body}
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)
    return path


def _read(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text())
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema is {document['schema']!r}, not {SCHEMA!r}")
        if document["sha256"] != _digest(document["body"]):
            raise ValueError("its checksum does not match")
        return document["body"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise _damaged(path, error) from error


def _parse(path: Path, body: dict[str, Any], make: Any) -> Any:
    try:
        return make(body)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot read the stored profile {path}: {error}",
        hint="delete it, or measure again with `mxn train profile --fresh`",
    )
