"""Settings of one replica: frozen, checked once, and sent to the engine process as JSON.

Knows no torch and reads no environment except for the number of CPU cores this process may use.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mxn.errors import ConfigError

KV_FRACTION = 0.85  # of what the weights leave free on a device with memory of its own
KV_FRACTION_HOST = 0.3  # main memory belongs to everybody on the machine
SPECULATIONS = ("off", "ngram", "mtp")
MAX_DRAFT_TOKENS = 32
DEFAULT_LOADER = "mxn.engine.load:load_checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What one engine process runs and how much of the machine it may use."""

    model: str  # a directory or a hub id
    device: str = "auto"
    dtype: str = "auto"
    weights: str = "plain"  # plain: as `dtype` says; or a format of the native CPU kernels
    kv: str = "auto"  # format of the cache, where `weights` is not plain
    threads: int = 0  # CPU threads; 0 = OMP_NUM_THREADS, or all cores this process may use
    page_tokens: int = 16
    kv_bytes: int | None = None  # memory of the page pool; None = kv_fraction of what is free
    kv_fraction: float | None = None  # None = KV_FRACTION, or KV_FRACTION_HOST of main memory
    max_batch_tokens: int = 2048  # new tokens in one step
    max_sequences: int = 64  # sequences in one step
    max_waiting: int = 4096  # requests in the queue before new ones are refused
    max_context: int | None = None  # None = what the model was made for
    max_adapters: int = 32  # LoRA adapters loaded at the same time; 0 refuses them
    prefix_caching: bool = True
    allow_fallback: bool = True  # run through transformers when there is no native spec
    prefer_fallback: bool = False
    speculation: str = "off"  # guess tokens and verify them: off, ngram, mtp (where a model has it)
    num_draft_tokens: int = 4  # guesses of one sequence in one step
    max_draft_rows: int = 16  # tokens in one step from which on it carries no more guesses
    cuda_graphs: bool = True  # replay decode steps where the device and the kernels allow it
    loader: str = DEFAULT_LOADER  # "module:function" that turns this config into a `LoadedReplica`

    def __post_init__(self) -> None:
        for name in ("page_tokens", "max_batch_tokens", "max_sequences", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.max_adapters < 0:
            raise ConfigError(f"max_adapters must be 0 or more, got {self.max_adapters!r}")
        if self.threads < 0:
            raise ConfigError(f"threads must be 0 (all cores) or more, got {self.threads!r}")
        if self.kv_fraction is not None and not 0 < self.kv_fraction <= 1:
            raise ConfigError(f"kv_fraction must be in (0, 1], got {self.kv_fraction!r}")
        if self.max_context is not None and self.max_context < 1:
            raise ConfigError(f"max_context must be at least 1, got {self.max_context!r}")
        if self.kv_bytes is not None and self.kv_bytes < 1:
            raise ConfigError(f"kv_bytes must be at least 1, got {self.kv_bytes!r}")
        self._check_formats()
        self._check_speculation()
        if self.max_batch_tokens < self.max_sequences:
            raise ConfigError(
                f"max_batch_tokens {self.max_batch_tokens!r} is less than max_sequences "
                f"{self.max_sequences!r}: each running sequence needs one token of a step",
                hint="raise max_batch_tokens or lower max_sequences",
            )

    def _check_formats(self) -> None:
        from mxn.kernels.native import formats

        if self.weights != "plain":
            formats.parse(self.weights, self.kv)
        elif self.kv != "auto":
            raise ConfigError(
                f"the cache format {self.kv!r} needs weights that the native kernels read",
                hint="--weights bf16, int8 or int4",
            )

    def _check_speculation(self) -> None:
        if self.speculation not in SPECULATIONS:
            raise ConfigError(
                f"speculation must be one of {', '.join(SPECULATIONS)}, got {self.speculation!r}"
            )
        if not 1 <= self.num_draft_tokens <= MAX_DRAFT_TOKENS:
            raise ConfigError(
                f"num_draft_tokens must be 1 to {MAX_DRAFT_TOKENS}, got {self.num_draft_tokens!r}",
                hint="speculation='off' makes no drafts",
            )
        if self.max_draft_rows < 0:
            raise ConfigError(f"max_draft_rows must be 0 or more, got {self.max_draft_rows!r}")

    def to_json(self) -> str:
        """Return the settings as one line of JSON; `from_json` reads it back."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        """Raises: ConfigError for a value of the wrong type or out of range."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"engine settings: {error}") from None

    @property
    def num_threads(self) -> int:
        """CPU threads to use, never 0: as asked for, or OMP_NUM_THREADS, or all usable cores."""
        given = os.environ.get("OMP_NUM_THREADS", "")
        return self.threads or (int(given) if given.isdigit() else 0) or usable_cores()


def usable_cores() -> int:
    """Return the cores this process may use: its affinity, cut by the control group's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no control groups of version 2 here: no quota
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
