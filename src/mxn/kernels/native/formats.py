"""Names of the formats that weights and caches can have in native kernels. Imports no torch.

``int4-g64`` means 4 bits with a scale and a minimum for each 64 columns of a row, ``int6-g64`` 6
bits with a scale, ``int8`` one scale for each row, ``bf16`` and ``f32`` what they say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mxn.errors import ConfigError

GROUPS = (16, 32, 64, 128)
DEFAULT_GROUP = 64
CACHES = ("f32", "bf16", "int8")
_NAME = re.compile(r"(int4|int6|int8)(?:-g(\d+))?(-sym)?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How one matrix is stored. `group` 0: one scale for a whole row."""

    bits: int  # 4, 6, 8, 16, 32
    group: int = 0
    is_symmetric: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.bits <= 8

    def __str__(self) -> str:
        if not self.is_quantized:
            return "bf16" if self.bits == 16 else "f32"
        group = f"-g{self.group}" if self.group else ""
        is_marked = self.is_symmetric and self.bits == 4
        return f"int{self.bits}{group}{'-sym' if is_marked else ''}"


F32, BF16 = WeightFormat(bits=32), WeightFormat(bits=16)
INT8 = WeightFormat(bits=8, is_symmetric=True)
INT6 = WeightFormat(bits=6, group=128, is_symmetric=True)


def parse_weights(text: str) -> WeightFormat:
    """Return the format that `text` names. Raises: ConfigError with the known names."""
    if text in ("f32", "float32"):
        return F32
    if text in ("bf16", "bfloat16"):
        return BF16
    found = _NAME.match(text)
    group = int(found[2]) if found and found[2] else 0
    if found is None or (group and group not in GROUPS):
        raise ConfigError(
            f"unknown weight format {text!r}",
            hint="f32, bf16, int8, int6, int4, int4-g32, int4-g64, int4-g128; -sym for no minimum",
        )
    if found[1] == "int8":
        return WeightFormat(bits=8, group=group, is_symmetric=True)
    if found[1] == "int6":
        return WeightFormat(bits=6, group=group or DEFAULT_GROUP, is_symmetric=True)
    return WeightFormat(bits=4, group=group or DEFAULT_GROUP, is_symmetric=found[3] is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFormat:
    """Formats of a whole decoder."""

    weights: WeightFormat
    head: WeightFormat  # output projection, and the embedding table when it is tied
    cache: str  # one of CACHES
    act_group: int = 0  # columns of an activation that share a scale where weights have one a row

    def __str__(self) -> str:
        return f"weights {self.weights}, head {self.head}, cache {self.cache}"


def parse(weights: str, cache: str = "auto") -> ModelFormat:
    """Return the formats that `--weights` and `--kv` name; auto: int8 where weights are quantized.

    Raises: ConfigError with the known names.
    """
    found = parse_weights(weights)
    if cache == "auto":
        cache = "int8" if found.is_quantized else "bf16" if found.bits == 16 else "f32"
    if cache not in CACHES:
        raise ConfigError(f"unknown cache format {cache!r}", hint=f"auto, {', '.join(CACHES)}")
    # Beside 4-bit layers a head of 8 bits would be read for nothing: its error is 20 times smaller.
    head = found if not found.is_quantized else INT8 if found.bits == 8 else INT6
    return ModelFormat(weights=found, head=head, cache=cache)
