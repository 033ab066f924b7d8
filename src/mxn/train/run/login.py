"""Keeps names and passwords of tracking servers out of files and logs.

A job may give `mlflow: http://user:password@host`. What is stored, printed and handed on has
`***@` in that place; the rest stays in this process and those it starts, in the variables that
MLflow itself reads. Knows no MLflow. Start at `take_login`.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from mxn.errors import ConfigError, UserError

if TYPE_CHECKING:
    from mxn.train.run.job import Job

USER = "MLFLOW_TRACKING_USERNAME"
PASSWORD = "MLFLOW_TRACKING_PASSWORD"
HIDDEN = "***"
_FILES = ("file", "sqlite")  # their addresses are paths, which may hold an '@'
_SECRET_QUERY = re.compile(r"[?&](password|passwd|pwd|token|access_token|secret|api_key)=", re.I)
_IN_TEXT = re.compile(r"://[^/\s'\"][^\s'\"]*@")
_HOW = f"set {USER} and {PASSWORD}, and leave them out of the address"


def take_login(uri: str, env: MutableMapping[str, str] | None = None) -> str:
    """Return a tracking URI that may be stored; what it may not show goes into `env`.

    `env` None: the variables of this process, which ranks inherit.
    Raises: ConfigError, without the secret, for a URI whose secret cannot be told from the rest.
    """
    env = os.environ if env is None else env
    if _SECRET_QUERY.search(uri):
        raise ConfigError("tracking: mlflow: the address has a secret behind '?'", hint=_HOW)
    try:
        parts = urlsplit(uri)
        _ = parts.port  # a '/' or '#' in a password ends up here, if no digits stand before it
    except ValueError:
        raise ConfigError("tracking: mlflow: this is no address", hint=_HOW) from None
    login, at, host = parts.netloc.rpartition("@")
    behind = urlunsplit(parts._replace(scheme="", netloc=""))
    if "@" in behind and parts.scheme.partition("+")[0] not in _FILES:
        raise ConfigError(
            "tracking: mlflow: the address has an '@' where none belongs, and may hold a password "
            "that cannot be told from the rest",
            hint=f"{_HOW}; write http://… before a host, file:///… before a path, and %40 for an "
            "'@' in a name",
        )
    if not at or login == HIDDEN:
        return uri
    user, _, password = login.partition(":")
    env[USER], env[PASSWORD] = unquote(user), unquote(password)
    return urlunsplit(parts._replace(netloc=f"{HIDDEN}@{host}"))


def hide_login(job: Job) -> Job:
    """Return the job with a tracking URI that may be stored; see `take_login`."""
    if job.tracking.mlflow is None:
        return job
    return replace(job, tracking=replace(job.tracking, mlflow=take_login(job.tracking.mlflow)))


def with_login(uri: str) -> str:
    """Return the URI to connect with: never to be stored or printed.

    Raises: UserError when the job was given a name and a password, and this process has none.
    """
    parts = urlsplit(uri)
    login, at, host = parts.netloc.rpartition("@")
    if not at or login != HIDDEN:
        return uri
    user, password = os.environ.get(USER), os.environ.get(PASSWORD, "")
    if user is None:
        raise UserError(
            f"MLflow at {host} was given with a name and a password, which are not stored",
            hint=f"set {USER} and {PASSWORD}, or start the job from its job file again",
        )
    if parts.scheme in ("http", "https") and password:
        return urlunsplit(parts._replace(netloc=host))  # MLflow reads the variables itself
    inserted = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
    return urlunsplit(parts._replace(netloc=f"{inserted}@{host}"))


def without_login(text: str) -> str:
    """Return a text, such as an error, without names and passwords in its URIs."""
    password = os.environ.get(PASSWORD)
    if password and len(password) > 3:  # shorter ones would cut words in pieces
        text = text.replace(password, HIDDEN).replace(quote(password, safe=""), HIDDEN)
    return _IN_TEXT.sub(f"://{HIDDEN}@", text)
