"""Where the weights of a job come from: a Hugging Face checkpoint, or drawn from a seed.

Reads only the layers that a chunk holds. The same name gets the same numbers in every plan. Knows
no ranks. Start at `ModelSource.open`, then `ModelSource.stage`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mxn.errors import NotFoundError, UnsupportedError
from mxn.models.checkpoint import Checkpoint
from mxn.models.families import Family, find_decoder, find_encoder, why_not_native
from mxn.models.families.config import fix_long_rope, load_config
from mxn.models.hub import resolve
from mxn.models.load import architecture, checkpoint_dtype
from mxn.models.native.files import is_artifact
from mxn.models.spec import DecoderSpec
from mxn.models.storage import read_json
from mxn.train.run.net import StageModule
from mxn.train.run.net.shard import Team
from mxn.train.run.net.stage import Recompute

log = logging.getLogger("mxn.train")

Begin = Literal["checkpoint", "scratch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model that can be trained, before any of its weights is read."""

    folder: Path
    config_json: dict[str, Any]
    family: Family
    spec: DecoderSpec
    biases: frozenset[str]
    begin: Begin = "checkpoint"
    seed: int = 0
    initializer_range: float = 0.02
    checkpoint: Checkpoint | None = field(default=None, compare=False)  # None: from scratch

    @classmethod
    def open(
        cls, model: str | Path, *, seq_tokens: int, begin: Begin = "checkpoint", seed: int = 0
    ) -> ModelSource:
        """Find a model by folder or hub id. `begin="scratch"` needs its config and tokenizer only.

        `seq_tokens`: the length of rows, which decides where positions depend on it (LongRoPE).
        Raises: NotFoundError when it is not there; UnsupportedError with the reason when it cannot
        be trained.
        """
        folder = resolve(str(model))
        if folder.is_file() or is_artifact(folder):
            raise UnsupportedError(
                f"{folder.name} holds packed weights, which cannot be trained",
                hint="train the checkpoint it was made from",
            )
        checkpoint = Checkpoint(folder) if begin == "checkpoint" else None
        config_json = read_json(folder / "config.json")
        family = _trainable_family(config_json)
        config = load_config(folder, config_json)
        fix_long_rope(config, seq_tokens)
        spec = family.spec(config)
        if seq_tokens > spec.max_positions:
            raise UnsupportedError(
                f"rows of {seq_tokens} tokens are longer than the {spec.max_positions} positions"
                f" that {folder.name} has",
                hint=f"seq_tokens: {spec.max_positions}",
            )
        if checkpoint is not None:
            biases = {name.removesuffix(".bias") for name in checkpoint.names if _is_bias(name)}
            if spec.is_tied and _has_own_head(checkpoint, family):
                log.warning("config.json says tied embeddings, but the head differs: it is used")
                spec = replace(spec, is_tied=False)
        else:
            biases = _biases_of(config, config_json)
        return cls(
            folder=folder,
            config_json=config_json,
            family=family,
            spec=spec,
            biases=frozenset(biases),
            begin=begin,
            seed=seed,
            initializer_range=float(getattr(config, "initializer_range", None) or 0.02),
            checkpoint=checkpoint,
        )

    @property
    def num_layers(self) -> int:
        """Plan layers: blocks, embedding and head."""
        return len(self.spec.layers) + 2

    @property
    def stored_dtype(self) -> str:
        return checkpoint_dtype(self.config_json)

    def stage(
        self,
        first: int,
        end: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        recompute: Recompute = "none",
        team: Team | None = None,
    ) -> StageModule:
        """Return plan layers `first` to `end` - 1 with their weights, on the device.

        With a `team`, this rank's part: each tensor is read or drawn whole and then cut.
        """
        stage = self.empty_stage(
            first, end, dtype=dtype, device=device, recompute=recompute, team=team
        )
        for layer in range(first, end):
            like = stage.layer_state(layer)
            if team is not None:
                like = self.empty_stage(layer, layer + 1, device="meta").layer_state(layer)
            stage.load_layer_state(layer, stage.part_of(layer, self.layer_state(layer, like)))
        return stage

    def empty_stage(
        self,
        first: int,
        end: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        recompute: Recompute = "none",
        team: Team | None = None,
    ) -> StageModule:
        """Return the layers without values; on the device ``meta`` they take no memory."""
        return StageModule(
            self.spec,
            self.family.names,
            first,
            end,
            biases=self.biases,
            dtype=dtype,
            device=device,
            recompute=recompute,
            team=team,
        )

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Return name and shape of all tensors of a plan layer."""
        stage = self.empty_stage(layer, layer + 1, device="meta")
        return {name: tuple(tensor.shape) for name, tensor in stage.layer_state(layer).items()}

    def layer_state(self, layer: int, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that `like` names: read, or drawn from the seed and their names.

        Raises: NotFoundError for a checkpoint that lacks one; UnsupportedError for a weight of the
        layer that the family does not know, as the loss would be another model's.
        """
        if self.checkpoint is None:
            return {
                name: draw(self._stored_name(name), tensor.shape, self)
                for name, tensor in like.items()
            }
        self._refuse_unknown(layer, like)
        return {name: self.checkpoint.read(self._stored_name(name)) for name in like}

    def _stored_name(self, name: str) -> str:
        """A tied head is the embedding under another name."""
        names = self.family.names
        is_tied_head = self.spec.is_tied and name == f"{names.head}.weight"
        return f"{names.embedding}.weight" if is_tied_head else name

    def _refuse_unknown(self, layer: int, like: Mapping[str, Tensor]) -> None:
        assert self.checkpoint is not None
        if not 0 < layer < self.num_layers - 1:
            return
        prefix = self.family.names.layer.format(i=layer - 1)
        parts = (".weight", ".bias")
        unknown = [
            name
            for name in self.checkpoint.names
            if name.startswith(prefix) and name.endswith(parts) and name not in like
        ]
        if unknown:
            raise UnsupportedError(
                f"the checkpoint has {len(unknown)} weights that the {self.family.name} family does"
                f" not use: {', '.join(unknown[:3])}",
                hint="it is a variant of that architecture; its loss would be wrong",
            )


def draw(name: str, shape: torch.Size | tuple[int, ...], source: ModelSource) -> Tensor:
    """Return the initial float32 values of a tensor: they depend on seed, name and shape only.

    Matrices are normal with the config's `initializer_range`; norms are the identity, biases zero.
    """
    if len(shape) > 1:
        generator = generator_for(name, source.seed)
        return torch.empty(shape).normal_(0.0, source.initializer_range, generator=generator)
    is_norm = name.endswith(".weight")
    return torch.full(shape, 1.0 if is_norm and not source.spec.is_norm_offset else 0.0)


def generator_for(name: str, seed: int) -> torch.Generator:
    """Return the random numbers that belong to a tensor, whichever rank draws them."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def _trainable_family(config_json: dict[str, Any]) -> Family:
    """Return the native family. Raises: UnsupportedError with the reason."""
    family = find_decoder(config_json)
    if family is not None:
        return family
    name = architecture(config_json)
    if not config_json:
        raise NotFoundError("the model folder has no config.json")
    if find_encoder(config_json) is not None:
        raise UnsupportedError(f"{name!r} is an encoder; mxn trains decoders")
    reason = why_not_native(config_json)
    raise UnsupportedError(
        f"architecture {name!r} cannot be trained: {reason or 'mxn has no native spec for it'}",
        hint="`mxn models --families` lists the native ones",
    )


def _has_own_head(checkpoint: Checkpoint, family: Family) -> bool:
    """Whether a checkpoint that calls itself tied holds a head of other numbers all the same."""
    head, embedding = f"{family.names.head}.weight", f"{family.names.embedding}.weight"
    if head not in checkpoint:
        return False
    stored, table = checkpoint.read(head), checkpoint.read(embedding)
    return stored.shape != table.shape or not torch.equal(stored, table)


def _biases_of(config: Any, config_json: dict[str, Any]) -> set[str]:
    """Return which modules of a model that has no weights yet have a bias: transformers knows."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if config_json.get("model_type") not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"{architecture(config_json)!r} cannot begin from scratch: its code is not part of"
            " transformers, so it is not known which matrices have a bias",
            hint="begin from a checkpoint",
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name.removesuffix(".bias") for name, _ in model.named_parameters() if _is_bias(name)}
