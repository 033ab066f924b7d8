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

__all__ = ["Family", "decoder_families", "find_decoder", "find_encoder"]

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
    names = set(config_json.get("architectures") or [])
    for family in decoder_families():
        if names & set(family.architectures) and not (
            family.why_not and family.why_not(config_json)
        ):
            return family
    return None
