"""What was measured on this machine, one JSON file for each chip in MXN_HOME/chips."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from mxn import env
from mxn.chips.roofline import SCHEMA, Measurement, Reading
from mxn.errors import ConfigError


def path_of(chip: str) -> Path:
    """Return where the measurement of a chip is kept."""
    return env.home() / "chips" / f"{chip}.json"


def store(measurement: Measurement) -> Path:
    """Keep a measurement, replacing the one before it whole, and return where."""
    path = path_of(measurement.chip)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(dataclasses.asdict(measurement), indent=2) + "\n")
    part.replace(path)
    return path


def load(chip: str) -> Measurement | None:
    """Return what was measured on a chip, or None when nothing was.

    Raises: ConfigError for a file that is none of ours or of another version.
    """
    path = path_of(chip)
    try:
        data = json.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema is {data['schema']!r}, not {SCHEMA!r}")
        data["readings"] = tuple(Reading(**reading) for reading in data["readings"])
        return Measurement(**data)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"cannot read the measurement {path}: {error}", hint="measure again: mxn chips measure"
        ) from error
