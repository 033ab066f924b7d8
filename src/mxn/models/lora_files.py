"""Reads a LoRA adapter in PEFT's layout: adapter_config.json beside adapter_model.safetensors.

What would change the numbers and is not read here is refused by its name; options that nobody has
heard of are refused too. Knows no model: modules keep the names they have in transformers. Start at
`read_adapter`. Shape letters: D inputs and F outputs of a module, R rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxn.errors import NotFoundError, UnsupportedError
from mxn.models.checkpoint import read_json

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "base_model.model."
_WEIGHT = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight")
# PEFT copies these out of the base, also where nothing in them was trained.
_EMBEDDINGS = ("lm_head.weight", "embed_tokens.weight", ".base_layer.weight")

# Options of `LoraConfig` that are read below, or that change training and not what is computed.
_READ = {
    "peft_type", "task_type", "r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern",
    "alpha_pattern", "bias", "init_lora_weights",
}  # fmt: skip
_HARMLESS = {
    "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out",
    "layers_to_transform", "layers_pattern", "exclude_modules", "auto_mapping", "peft_version",
    "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "eva_config",
}  # fmt: skip
# Other ways to begin change the base weights as well, so that the adapter alone is half a model.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class Pair:
    """y += scale * (x Aᵀ) Bᵀ for one module."""

    a_RD: Tensor
    b_FR: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a_RD.shape[0]

    @property
    def num_parameters(self) -> int:
        return self.a_RD.numel() + self.b_FR.numel()


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter as it is stored: pairs by the module they belong to, as transformers names it."""

    path: Path
    base: str  # what it was trained on, as its config says; may be empty or a path elsewhere
    pairs: dict[str, Pair]

    @property
    def rank(self) -> int:
        """The largest of all pairs."""
        return max(pair.rank for pair in self.pairs.values())

    @property
    def num_parameters(self) -> int:
        return sum(pair.num_parameters for pair in self.pairs.values())


def read_adapter(path: Path | str) -> AdapterFiles:
    """Return the adapter in the folder `path`, on the CPU and in its stored dtype.

    Raises: NotFoundError for a folder or file that is not there or is cut short; UnsupportedError,
    with the option and its value, for what mxn does not compute.
    """
    folder = Path(path)
    if not (folder / "adapter_config.json").is_file():
        what = "has no adapter_config.json" if folder.is_dir() else "is not a folder"
        raise NotFoundError(
            f"{str(folder)!r} {what}", hint="give the folder that PEFT's save_pretrained wrote"
        )
    config = read_json(folder / "adapter_config.json")
    _refuse_other(config)
    sides = _sort(_tensors(folder))
    pairs = {module: _pair(module, config, *sides[module]) for module in sorted(sides)}
    _check_targets(config, pairs)
    base = str(config.get("base_model_name_or_path") or "")
    return AdapterFiles(path=folder, base=base, pairs=pairs)


def _refuse_other(config: dict[str, Any]) -> None:
    """Raise UnsupportedError for an adapter whose arithmetic is not that of plain LoRA."""
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "LORA":
        raise UnsupportedError(f"peft_type is {kind!r}; mxn reads 'LORA'")
    if task not in (None, "CAUSAL_LM"):
        raise UnsupportedError(f"task_type is {task!r}; mxn reads 'CAUSAL_LM'")
    if config.get("bias", "none") != "none":
        raise UnsupportedError(f"bias is {config['bias']!r}; mxn reads adapters with bias 'none'")
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        raise UnsupportedError(
            f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base too",
            hint="save it with path_initial_model_for_weight_conversion, as a plain adapter",
        )
    for name in sorted(config.keys() - _READ - _HARMLESS):
        if config[name]:  # off, None and empty are how PEFT writes what is not used
            raise UnsupportedError(f"{name} is {config[name]!r}; mxn reads plain LoRA without it")


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        has_pickle = (folder / "adapter_model.bin").is_file()
        raise NotFoundError(
            f"{str(folder)!r} has no adapter_model.safetensors"
            + (" (adapter_model.bin, a pickle file, is not loaded)" if has_pickle else ""),
            hint="save it with save_pretrained(..., safe_serialization=True)",
        )
    try:
        # Read whole: a mapped file would be read where it is used, in the loop of the engine.
        return load(file.read_bytes())
    except SafetensorError as error:
        raise NotFoundError(
            f"{file.name} is not a readable safetensors file: {error}",
            hint="copy it again: it is cut short or corrupted",
        ) from error


def _sort(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (A, B) by module. Raises: UnsupportedError for tensors of any other kind."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _WEIGHT.fullmatch(name)
        if not found or not name.startswith(_PREFIX):
            raise UnsupportedError(
                f"the adapter has the tensor {name!r} ({_why_not(name)}); mxn reads lora_A and"
                " lora_B of linear layers",
                hint="if the base is unchanged: save_pretrained(…, save_embedding_layers=False)"
                if name.endswith(_EMBEDDINGS)
                else None,
            )
        sides.setdefault(found["module"].removeprefix(_PREFIX), {})[found["side"]] = tensor
    if not sides:
        raise UnsupportedError("the adapter has no tensors")
    for module, found in sides.items():
        if len(found) != 2:
            missing = "B" if "A" in found else "A"
            raise NotFoundError(f"the adapter has no lora_{missing} for {module!r}")
    return {module: (found["A"], found["B"]) for module, found in sides.items()}


def _why_not(name: str) -> str:
    if "lora_embedding" in name:
        return "an embedding"
    if "lora_magnitude_vector" in name:
        return "DoRA"
    if not name.startswith(_PREFIX):
        return f"without the prefix {_PREFIX!r}"
    return "a bias" if name.endswith(".bias") else "a whole weight"


def _pair(module: str, config: dict[str, Any], a_RD: Tensor, b_FR: Tensor) -> Pair:
    rank = _pattern_value(config.get("rank_pattern"), module, config.get("r"))
    alpha = _pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    for name, value in (("r", rank), ("lora_alpha", alpha)):
        if not isinstance(value, int | float) or value <= 0:
            raise UnsupportedError(f"{name} of {module!r} must be above 0, got {value!r}")
    for side, tensor in (("lora_A", a_RD), ("lora_B", b_FR)):
        if tensor.ndim != 2 or not tensor.is_floating_point() or tensor.itemsize < 2:
            raise UnsupportedError(
                f"{side} of {module!r} is {tuple(tensor.shape)} in {tensor.dtype};"
                " a matrix of floating-point numbers is needed"
            )
    if not rank == a_RD.shape[0] == b_FR.shape[1]:
        raise UnsupportedError(
            f"{module!r} has rank {rank!r} by adapter_config.json, but lora_A is"
            f" {tuple(a_RD.shape)} and lora_B is {tuple(b_FR.shape)}"
        )
    return Pair(a_RD, b_FR, alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _pattern_value(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that the name, or the end of it, matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_targets(config: dict[str, Any], pairs: dict[str, Pair]) -> None:
    """Refuse files that lack a kind of module which adapter_config.json says was trained."""
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    if isinstance(targets, str):
        odd = [module for module in pairs if not re.fullmatch(targets, module)]
        if odd:
            raise UnsupportedError(f"target_modules {targets!r} does not match {odd[0]!r}")
        return
    for target in targets:
        if not any(module == target or module.endswith(f".{target}") for module in pairs):
            raise NotFoundError(
                f"target_modules names {target!r}, but adapter_model.safetensors has no such module"
            )
