"""From what a user types to a model on disk: a directory, a GGUF file, or a Hugging Face hub id.

`HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to `huggingface_hub`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from mxn.errors import NotFoundError
from mxn.models.quantized.gguf_storage import find_gguf

# Weights in pickle files are left out on purpose: loading one can run any code.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "**/config.json")
# The same weights once more, under their maker's names.
_UNWANTED = ("consolidated*", "original/*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# One file of a repository: those of GGUF hold the same model many times.
_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w.-]+\.gguf)")


def resolve(model: str, *, revision: str | None = None) -> Path:
    """Return the directory or GGUF file of `model`; a hub id not in the cache is downloaded.

    Raises: NotFoundError when it is neither a model nor a reachable hub id.
    """
    path = Path(model).expanduser()
    gguf = find_gguf(path)
    if gguf is not None and gguf.is_file():
        return gguf.resolve()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise NotFoundError(
                f"{str(path)!r} has no config.json and no GGUF file",
                hint="name a model directory, a GGUF file, or a hub id such as Qwen/Qwen3-0.6B",
            )
        return path.resolve()
    file = _HUB_FILE.fullmatch(model)
    if file is not None:
        return _download_file(file[1], file[2], revision)
    if not _HUB_ID.fullmatch(model) or path.suffix == ".gguf":
        raise NotFoundError(
            f"no model directory at {model!r}, and it is not a hub id",
            hint="`mxn models` lists what is here",
        )
    return _download(model, revision)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return _fetched(
        hub_id,
        lambda: snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=list(_WANTED),
            ignore_patterns=list(_UNWANTED),
        ),
    )


def _download_file(hub_id: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    return _fetched(hub_id, lambda: hf_hub_download(hub_id, name, revision=revision))


def _fetched(hub_id: str, fetch: Callable[[], str]) -> Path:
    """Return where `fetch` put it. Raises: NotFoundError, saying why it cannot come."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(fetch())
    except LocalEntryNotFoundError as error:
        reason = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else f"the hub at {constants.ENDPOINT} cannot be reached"
        )
        raise NotFoundError(
            f"model {hub_id!r} is not in the local cache ({constants.HF_HUB_CACHE}) and {reason}",
            hint="name a local directory, or set HF_ENDPOINT to a mirror that this machine reaches",
        ) from error
    except HfHubHTTPError as error:
        raise NotFoundError(
            f"model {hub_id!r} cannot be downloaded: {error}",
            hint="check the name; for a gated model set HF_TOKEN",
        ) from error
