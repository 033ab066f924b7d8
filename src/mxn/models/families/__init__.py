"""The families mxn describes natively. `find_decoder` and `find_encoder` pick one.

Each module lists its `FAMILIES`: the architectures a family answers to, a function from a
transformers config to a `DecoderSpec`, and the names of its weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mxn.models.families.encoders import find_encoder
from mxn.models.names import Names
from mxn.models.spec import DecoderSpec

__all__ = ["Family", "decoder_families", "find_decoder", "find_encoder", "why_not_native"]

_MODULES = (
    "llama", "mistral", "mixtral", "qwen", "deepseek", "glm", "phi3", "gemma", "olmo2",
    "internlm", "minicpm", "granite",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    """How one family of checkpoints is read."""

    name: str
    architectures: tuple[str, ...]  # class names in config.json
    spec: Callable[[Any], DecoderSpec]
    names: Names = field(default_factory=Names)
    why_not: Callable[[Any], str | None] | None = None
    """Given config.json: a reason when this checkpoint uses a part the spec does not cover."""


@cache
def decoder_families() -> tuple[Family, ...]:
    """Return all native decoder families."""
    found: list[Family] = []
    for module_name in _MODULES:
        module = importlib.import_module(f"mxn.models.families.{module_name}")
        found.extend(module.FAMILIES)
    return tuple(found)


def find_decoder(config_json: dict[str, Any]) -> Family | None:
    """Return the native family of a config.json, or None: then the fallback may know it."""
    return None if why_not_native(config_json) else _family_of(config_json)


def why_not_native(config_json: dict[str, Any]) -> str | None:
    """Return why the family of this architecture does not cover this checkpoint, if it does not."""
    family = _family_of(config_json)
    return family.why_not(config_json) if family and family.why_not else None


def _family_of(config_json: dict[str, Any]) -> Family | None:
    names = set(config_json.get("architectures") or [])
    return next((f for f in decoder_families() if names & set(f.architectures)), None)
