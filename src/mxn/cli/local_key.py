"""The key that `mxn up` makes for this machine: one file that only its owner can read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from mxn import env
from mxn.errors import ConfigError


def local_key() -> str | None:
    """Return the key of this machine, or None if `mxn up` never ran."""
    path = env.home() / "key"
    return (path.read_text().strip() or None) if path.is_file() else None


def ensure_local_key() -> str:
    """Return the key of this machine, made at the first call.

    Two processes that call this at the same time get the same key: the file appears under its name
    only once it is whole, and only one of them can make it.
    Raises: ConfigError for a file without a key.
    """
    path = env.home() / "key"
    key = local_key() if path.is_file() else _create(path)
    if not key:
        raise ConfigError(f"{path} holds no key", hint=f"remove it: rm {path}")
    return key


def _create(path: Path) -> str:
    key = f"sk-{secrets.token_urlsafe(32)}"
    draft = path.with_name(f"key.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(key + "\n")
        os.link(draft, path)  # fails where a rename would replace the key of another process
    except FileExistsError:
        return path.read_text().strip()
    finally:
        draft.unlink()
    return key
