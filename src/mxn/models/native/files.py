"""Names of the files of an artifact. Imports no torch: a catalogue asks for many directories."""

from __future__ import annotations

from pathlib import Path

MANIFEST = "mxn-artifact.json"
WEIGHTS = "weights.mxn"


def is_artifact(directory: Path) -> bool:
    """Return whether `directory` holds packed weights."""
    return (directory / MANIFEST).is_file()
