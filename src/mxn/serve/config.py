"""What a gateway is told: a TOML file and options of the command line, checked together.

port = 8000
database = "postgresql+psycopg://mxn@127.0.0.1/mxn"
replicas = ["qwen=http://10.0.0.7:8000,kind=mxn,key=env:REPLICA_KEY", "…"]
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from mxn.errors import ConfigError

_DEFAULTS_OF_CLI = {"host": "127.0.0.1", "port": 8000, "workers": 1, "drain_s": 30.0,
                    "leave_s": 0.0, "log_format": "text"}  # fmt: skip


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a gateway is told. `database` None: the default one; 'none': no accounts."""

    replicas: list[str] = []
    host: str = "127.0.0.1"
    port: int = 8000
    database: str | None = None
    workers: int = 1
    api_keys: list[str] = []
    request_timeout_s: float | None = None
    max_requests: int | None = None
    max_body_bytes: int = 32 << 20
    stall_limit_s: float | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    drain_s: float = 30.0
    leave_s: float = 0.0
    tls_cert: str | None = None
    tls_key: str | None = None
    log_format: Literal["text", "json"] = "text"
    otlp: str | None = None  # base URL of a collector of traces

    @classmethod
    def load(cls, path: Path) -> GatewayConfig:
        """Read a TOML file. Raises: ConfigError that names the file and the field."""
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
        return _checked(found, str(path))

    def merged(self, **options: Any) -> GatewayConfig:
        """Return this with what the command line says; an option at its default says nothing."""
        found = msgspec.structs.asdict(self)
        for name, value in options.items():
            if value is None or _DEFAULTS_OF_CLI.get(name) == value:
                continue
            found[name] = [*found[name], *value] if isinstance(value, list) else value
        return _checked(found, "the options")

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together")
        if not 1 <= self.workers <= 1024:
            raise ValueError(f"workers is from 1 to 1024, got {self.workers}")
        if not all(self.api_keys):
            raise ValueError("an API key is empty")


def _checked(found: dict[str, Any], where: str) -> GatewayConfig:
    try:
        return msgspec.convert(found, GatewayConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error
