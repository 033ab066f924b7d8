"""Which models are on this machine: those that ship with mxn, and those in the hub cache.

Reads file names and config.json only; loads nothing. Start at `find_models`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mxn.errors import MxnError
from mxn.models.load import architecture
from mxn.models.native.files import WEIGHTS
from mxn.models.quantized import find_format
from mxn.models.storage import read_config

_BEST_SHIPPED = "mxn-shakespeare-llama"


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A model directory on this machine.

    `support` is native, encoder, fallback (to be tried), or refused and why.
    """

    name: str
    path: Path
    architecture: str
    support: str
    source: str  # "ships with mxn", "hub cache" or "directory"
    num_bytes: int


def shipped_dir() -> Path:
    """Return the folder of the models that ship with mxn, a part of the package."""
    import mxn

    return Path(mxn.__file__).parent / "shipped"


def shipped_models() -> dict[str, Path]:
    """Return the models that ship with mxn, by name; the best one first."""
    found = {path.parent.name: path.parent for path in sorted(shipped_dir().glob("*/config.json"))}
    return dict(sorted(found.items(), key=lambda item: item[0] != _BEST_SHIPPED))


def find_models(directories: tuple[Path, ...] = ()) -> list[CatalogueEntry]:
    """Return the shipped models, the cached hub models, and the models in `directories`."""
    found = [_entry(name, path, "ships with mxn") for name, path in shipped_models().items()]
    found += [_entry(name, path, "hub cache") for name, path in _cached_hub_models()]
    for directory in directories:
        configs = sorted([*directory.glob("config.json"), *directory.glob("*/config.json")])
        found += [_entry(str(path.parent), path.parent, "directory") for path in configs]
        files = sorted([*directory.glob("*.gguf"), *directory.glob("*/*.gguf")])
        found += [_entry(str(path), path, "directory") for path in files]
    return found


def _cached_hub_models() -> list[tuple[str, Path]]:
    """Return (hub id, snapshot) pairs; the newest snapshot of each model that has weights."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    models = []
    for folder in sorted(cache.glob("models--*")):
        snapshots = [p for p in (folder / "snapshots").glob("*") if (p / "config.json").is_file()]
        snapshots = [p for p in snapshots if any(p.glob("*.safetensors"))]
        if snapshots:
            newest = max(snapshots, key=lambda path: path.stat().st_mtime)
            models.append((folder.name.removeprefix("models--").replace("--", "/"), newest))
    return models


def _entry(name: str, path: Path, source: str) -> CatalogueEntry:
    try:
        config_json = read_config(path)
        supported = support(config_json)
    except MxnError as error:  # one broken directory must not hide the others
        config_json, supported = {}, f"refused: {error.message}"
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob(WEIGHTS)]
    return CatalogueEntry(
        name=name,
        path=path,
        architecture=architecture(config_json),
        support=supported,
        source=source,
        num_bytes=sum(file.stat().st_size for file in files),
    )


def support(config_json: dict) -> str:
    """Return how mxn would run this model: native, encoder, or fallback (decided at load).

    Raises: UnsupportedError when it is refused whatever its architecture.
    """
    from mxn.models.families import find_decoder, find_encoder

    form = find_format(config_json)
    if find_encoder(config_json):
        return "encoder"
    if find_decoder(config_json):
        return "native"
    return "fallback" if form is None else f"refused: {form.name} weights need a native family"
