"""How a replica on another server is named on a command line or in a configuration file.

    MODEL=URL[,option=value…]        qwen=http://10.0.0.7:8000,kind=vllm,chip=nvidia-h200

Start at `ReplicaSpec.parse`. Knows how each kind is reached; opens no connection itself.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from mxn.errors import ConfigError
from mxn.serve.replicas.openai_compat import CompatConfig
from mxn.serve.replicas.upstream import KINDS, Continue, Kind, UpstreamConfig

Way = Literal["replica", "tokens", "pass"]
_OPTIONS = (
    "kind", "as", "key", "chip", "device", "tokenizer", "context", "continue", "via", "max_output",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """One replica of `model` at `url`.

    `via` is how it is reached: mxn's replica protocol, /v1/completions over token ids (needs
    `tokenizer`), or bodies passed through.
    """

    model: str
    url: str
    kind: Kind | None = None  # None: the server is asked, or `openai` for a pass-through
    remote_name: str = ""
    key: str | None = None
    chip: str = ""
    device: str = ""
    tokenizer: Path | None = None
    context: int | None = None
    continues: Continue | None = None
    via: Way = "pass"
    max_output: int | None = None  # tokens of an answer whose caller sets no limit but has a budget

    @classmethod
    def parse(cls, text: str) -> ReplicaSpec:
        """Read `MODEL=URL,option=value,…`. Raises: ConfigError."""
        model, found, rest = text.partition("=")
        if not found or not model or "://" in model:
            raise ConfigError(f"--replica {text!r}: expected MODEL=URL", hint=_EXAMPLE)
        url, *pairs = rest.split(",")
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ConfigError(f"--replica {text!r}: {url!r} is no http address", hint=_EXAMPLE)
        options = dict(_option(pair, text) for pair in pairs)
        kind = _kind(options.get("kind"), text)
        return cls(
            model=model,
            url=url.rstrip("/").removesuffix("/v1"),
            kind=kind,
            remote_name=options.get("as") or model,
            key=_secret(options["key"]) if "key" in options else None,
            chip=options.get("chip", ""),
            device=options.get("device", ""),
            tokenizer=Path(options["tokenizer"]) if "tokenizer" in options else None,
            context=_count("context", options, text),
            continues=_one_of(options["continue"], get_args(Continue), text)
            if "continue" in options
            else None,
            via=_way(options, kind, text),
            max_output=_count("max_output", options, text),
        )

    def upstream(self) -> UpstreamConfig:
        """Return what a pass-through needs."""
        return UpstreamConfig(
            url=self.url,
            model=self.remote_name,
            kind=self.kind or "openai",
            key=self.key,
            chip=self.chip,
            continues=self.continues,
            max_output=self.max_output,
        )

    def compat(self) -> CompatConfig:
        """Return what a replica over token ids needs."""
        return CompatConfig(
            url=self.url,
            model=self.remote_name,
            kind=self.kind,
            key=self.key,
            chip=self.chip,
            device=self.device,
            max_context=self.context,
        )


_EXAMPLE = "such as: --replica qwen=http://10.0.0.7:8000,kind=vllm,chip=nvidia-h200"


def _option(pair: str, text: str) -> tuple[str, str]:
    name, found, value = pair.partition("=")
    if name not in _OPTIONS or not found or not value:
        near = difflib.get_close_matches(name, _OPTIONS, n=1)
        hint = f"did you mean {near[0]}=…?" if near else f"one of {', '.join(_OPTIONS)}"
        raise ConfigError(f"--replica {text!r}: unknown or empty option {pair!r}", hint=hint)
    return name, value


def _kind(value: str | None, text: str) -> Kind | None:
    return None if value is None else _one_of(value, KINDS, text)


def _one_of(value: str, choices: tuple[str, ...], text: str) -> Any:
    if value not in choices:
        raise ConfigError(f"--replica {text!r}: {value!r} is not one of {', '.join(choices)}")
    return value


def _way(options: dict[str, str], kind: Kind | None, text: str) -> Way:
    """Return how the server is reached: as asked, else the best way its kind and options allow."""
    if "via" in options:
        way: Way = _one_of(options["via"], get_args(Way), text)
    elif kind == "mxn":
        way = "replica"
    else:
        way = "tokens" if "tokenizer" in options else "pass"
    if way == "tokens" and "tokenizer" not in options:
        raise ConfigError(
            f"--replica {text!r}: via=tokens needs the model's tokenizer",
            hint="add tokenizer=FOLDER, a folder with tokenizer.json",
        )
    if way == "replica" and kind not in (None, "mxn"):
        raise ConfigError(f"--replica {text!r}: only an mxn server speaks the replica protocol")
    return way


def _count(name: str, options: dict[str, str], text: str) -> int | None:
    value = options.get(name)
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or not 0 < int(value) < 2**31:
        raise ConfigError(f"--replica {text!r}: {name} is a number of tokens, got {value!r}")
    return int(value)


def _secret(value: str) -> str:
    """Return a key given as `env:NAME` or `file:PATH`; itself it would stand in process lists."""
    where, found, name = value.partition(":")
    if found and where == "env":
        key = os.environ.get(name, "")
    elif found and where == "file":
        path = Path(name).expanduser()
        key = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    else:
        raise ConfigError("the key of a replica is named, not shown", hint="key=env:NAME or file:…")
    if not key:
        raise ConfigError(f"the key of a replica, {value!r}, is not there or empty")
    return key
