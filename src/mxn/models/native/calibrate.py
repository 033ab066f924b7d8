"""The unified maximum of softmax: measured on prompts, stored by model, guarded at run time.

Every row of a layer subtracts the same `phi` instead of its own maximum, so that parts of a long
context need not agree on one. A row whose maximum is further than `margin` from it is computed
again with its own. Source: FlashDecoding++, arXiv 2311.01282, section 3. Start at `calibrate`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxn import env

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.models.native.decoder import NativeDecoder

# exp in float32 overflows at 88.7; a sum over a million tokens of values up to e^10 takes 24 of it.
MARGIN = 60.0
_SPARE = 10.0  # prompts that nobody calibrated on may go this much further


@dataclass(frozen=True, slots=True, kw_only=True)
class Maximum:
    """What one layer subtracts. `margin` 0: its range is too wide, each row takes its own."""

    phi: float
    margin: float
    low: float  # least and largest maximum of a row that was seen
    high: float
    rows: int


def calibrate(model: NativeDecoder, prompts: Sequence[Sequence[int]]) -> list[Maximum]:
    """Return the maximum of each layer from the rows of `prompts` (token ids).

    Raises: ValueError when there is no prompt.
    """
    if not any(prompts):
        raise ValueError("calibration needs at least one prompt")
    ranges = model.score_ranges([list(prompt) for prompt in prompts if prompt])
    return [_maximum(low, high, rows) for low, high, rows in ranges]


def _maximum(low: float, high: float, rows: int) -> Maximum:
    if not (math.isfinite(low) and math.isfinite(high)) or (high - low) / 2 + _SPARE > MARGIN:
        return Maximum(phi=0.0, margin=0.0, low=low, high=high, rows=rows)
    return Maximum(phi=(low + high) / 2, margin=MARGIN, low=low, high=high, rows=rows)


def fingerprint(config_json: dict[str, Any], model: NativeDecoder) -> str:
    """Return a name for these weights: the config, and some bytes of the head and two layers."""
    from mxn.models.native.decoder import packed_in

    digest = hashlib.sha256(json.dumps(config_json, sort_keys=True).encode())
    digest.update(str(model.format).encode())
    layers = model.parts.layers
    _sample(digest, model.parts.head.data, 16)
    for layer in (layers[0], layers[-1]):  # a fine-tuned model often keeps the head
        for weight in packed_in(layer):
            _sample(digest, weight.data, 4)
    return digest.hexdigest()[:32]


def _sample(digest: hashlib._Hash, data: Tensor, count: int) -> None:
    for start in range(0, len(data), max(1, len(data) // count)):
        digest.update(data[start : start + 4096].numpy().tobytes())


def _path(name: str) -> Path:
    return env.home() / "calibration" / f"{name}.json"


def store(name: str, maxima: list[Maximum], *, prompts: str) -> Path:
    """Keep a calibration for later loads; `prompts` says on what it was made."""
    path = _path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    text = {"basis": "measured", "prompts": prompts, "layers": [asdict(m) for m in maxima]}
    scratch.write_text(json.dumps(text, indent=1))
    scratch.replace(path)
    return path


def stored(name: str) -> list[Maximum] | None:
    """Return the calibration of these weights, or None; a broken file counts as none."""
    path = _path(name)
    if not path.is_file():
        return None
    try:
        return [Maximum(**layer) for layer in json.loads(path.read_text())["layers"]]
    except (ValueError, KeyError, TypeError):  # ValueError: no JSON, or no text at all
        return None
