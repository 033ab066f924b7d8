"""Reads the files that sentence-transformers puts beside a model: modules, pooling, lengths.

Knows the file formats of sentence-transformers 1 to 6; knows no tensors. Start at `read_recipe`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mxn.errors import NotFoundError, UnsupportedError
from mxn.models.checkpoint import read_json

Pooling = Literal["cls", "mean", "last"]

_POOLINGS: dict[str, Pooling] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_LEGACY_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, slots=True)
class DenseFiles:
    """A projection behind the pooling: where its tensors lie and what follows them."""

    directory: Path
    out_features: int
    has_tanh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceRecipe:
    """How token vectors become one vector."""

    pooling: Pooling = "mean"
    is_normalized: bool = False
    dense: tuple[DenseFiles, ...] = ()
    max_tokens: int | None = None


def read_recipe(directory: Path) -> SentenceRecipe:
    """Return the recipe of a model directory; mean pooling, not normalized, if it names none.

    That default is the one of sentence-transformers itself.
    Raises: UnsupportedError, with the module or pooling, for a recipe outside the ops of mxn.
    """
    max_tokens = _max_tokens(directory)
    modules = _modules(directory)
    if not modules:
        return SentenceRecipe(max_tokens=max_tokens)
    pooling: Pooling = "mean"
    dense: list[DenseFiles] = []
    is_normalized = False
    for module in modules:
        kind, path = module["type"].rsplit(".", 1)[-1], directory / module["path"]
        if is_normalized:
            raise UnsupportedError(f"modules.json of {directory} has {kind!r} behind 'Normalize'")
        if kind == "Pooling":
            pooling = _pooling(path)
        elif kind == "Dense":
            dense.append(_dense(path))
        elif kind == "Normalize":
            is_normalized = True
        elif kind not in ("Transformer", "Dropout"):
            raise UnsupportedError(
                f"modules.json of {directory} has module {kind!r};"
                " known are Transformer, Pooling, Dense, Dropout, Normalize"
            )
    return SentenceRecipe(
        pooling=pooling, is_normalized=is_normalized, dense=tuple(dense), max_tokens=max_tokens
    )


def _max_tokens(directory: Path) -> int | None:
    """Version 6 keeps the limit with the tokenizer, older ones in a file of their own."""
    for file, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        limit = read_json(directory / file).get(key)
        if limit:  # tokenizers without a limit store a number like 1e30, which limits nothing
            return int(limit)
    return None


def _modules(directory: Path) -> list[dict[str, Any]]:
    path = directory / "modules.json"
    if not path.is_file():
        return []
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise NotFoundError(f"{path.name} of {directory} is broken: {error}") from error
    return sorted(modules, key=lambda module: module["idx"])


def _pooling(path: Path) -> Pooling:
    config = read_json(path / "config.json")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _LEGACY_POOLINGS.items() if config.get(key)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise UnsupportedError(
            f"pooling {'+'.join(modes) or 'none'!r} in {path}/config.json is not one of"
            f" {', '.join(sorted(_POOLINGS))}"
        )
    return _POOLINGS[modes[0]]


def _dense(path: Path) -> DenseFiles:
    config = read_json(path / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    kind = activation.rsplit(".", 1)[-1]
    if kind not in ("Tanh", "Identity") or config.get("use_residual"):
        raise UnsupportedError(
            f"Dense module in {path} has activation {kind!r}"
            f"{' and a residual' if config.get('use_residual') else ''};"
            " known are Tanh and Identity without residual"
        )
    return DenseFiles(path, int(config["out_features"]), kind == "Tanh")
