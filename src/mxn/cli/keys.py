"""The key that `mxn up` makes for this machine: one file that only its owner can read."""

from __future__ import annotations

import os
import secrets

from mxn import env


def local_key() -> str | None:
    """Return the key of this machine, or None if `mxn up` never ran."""
    path = env.home() / "key"
    return path.read_text().strip() if path.is_file() else None


def ensure_local_key() -> str:
    """Return the key of this machine, made at the first call."""
    key = local_key()
    if key:
        return key
    key = f"sk-{secrets.token_urlsafe(32)}"
    path = env.home() / "key"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(key + "\n")
    return key
