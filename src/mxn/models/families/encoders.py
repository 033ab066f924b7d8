"""BERT, RoBERTa and XLM-R: their configs as `EncoderSpec`, the names of their weights, their heads.

Start at `find_encoder`. What pooling follows comes from the files of sentence-transformers
(`sentence_files.py`); a ``…ForSequenceClassification`` checkpoint becomes a reranker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mxn.errors import UnsupportedError
from mxn.models.checkpoint import Checkpoint
from mxn.models.families.config import activation, load_config
from mxn.models.families.sentence_files import DenseFiles, SentenceRecipe, read_recipe
from mxn.models.spec import EncoderSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mxn.chips.chip import Device
    from mxn.kernels.registry import Ops
    from mxn.models.encoder import Encoder, EncoderLayerWeights, EncoderWeights, Linear
    from mxn.models.load import LoadedModel


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """How checkpoints of one family of encoders are read."""

    name: str
    model_types: tuple[str, ...]
    class_prefixes: tuple[str, ...]  # of the class names in config.json
    weight_prefix: str  # in checkpoints of a model with a head; without one it is missing
    head: Literal["pooler", "roberta"]
    has_position_offset: bool

    def spec(self, config: Any, recipe: SentenceRecipe, *, is_reranker: bool) -> EncoderSpec:
        """Return the spec of a transformers config. Raises: UnsupportedError for an odd variant."""
        if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
            raise UnsupportedError(
                f"position_embedding_type {config.position_embedding_type!r} of a {self.name}"
                " encoder; known is 'absolute'"
            )
        if getattr(config, "is_decoder", False):
            raise UnsupportedError(
                f"is_decoder is set in the config of a {self.name} encoder: its tokens would see"
                " only what precedes them"
            )
        offset = config.pad_token_id + 1 if self.has_position_offset else 0
        positions = config.max_position_embeddings - offset
        return EncoderSpec(
            family=self.name,
            vocab_size=config.vocab_size,
            hidden=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            intermediate=config.intermediate_size,
            activation=activation(config.hidden_act),
            norm_eps=config.layer_norm_eps,
            max_positions=min(positions, recipe.max_tokens or positions),
            position_offset=offset,
            num_token_types=config.type_vocab_size,
            num_labels=config.num_labels if is_reranker else 0,
            head=self.head if is_reranker else "none",
            pooling=recipe.pooling,
            is_normalized=recipe.is_normalized,
            embedding_dim=recipe.dense[-1].out_features if recipe.dense else 0,
        )

    def load(
        self, checkpoint: Checkpoint, ops: Ops, device: Device, torch_dtype: torch.dtype
    ) -> LoadedModel:
        """Read the encoder onto the device: an embedder, or a reranker if it has a classifier."""
        from mxn.models.load import LoadedModel

        is_reranker = _is_reranker(checkpoint.config_json)
        config = load_config(checkpoint.directory, checkpoint.config_json)
        recipe = SentenceRecipe() if is_reranker else read_recipe(checkpoint.directory)
        spec = self.spec(config, recipe, is_reranker=is_reranker)
        encoder = self._read(spec, recipe, checkpoint, ops)
        return LoadedModel(
            model=encoder,
            kind="reranker" if is_reranker else "embedder",
            family=self.name,
            is_native=True,
            num_parameters=checkpoint.num_parameters,
            dtype=str(torch_dtype).removeprefix("torch."),
            max_context=spec.max_positions,
            kernels=ops.chosen(),
            unused_tensors=tuple(checkpoint.unread),
        )

    def _read(
        self, spec: EncoderSpec, recipe: SentenceRecipe, checkpoint: Checkpoint, ops: Ops
    ) -> Encoder:
        from mxn.models.encoder import Encoder

        probe = "embeddings.word_embeddings.weight"
        prefix = "" if probe in checkpoint else self.weight_prefix
        weights = _Reader(checkpoint, ops, prefix).weights(spec, recipe)
        return Encoder(spec, weights, ops)


class _Reader:
    """Reads the parts of one encoder by their names in a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, ops: Ops, prefix: str) -> None:
        self._checkpoint = checkpoint
        self._ops = ops
        self._prefix = prefix

    def weights(self, spec: EncoderSpec, recipe: SentenceRecipe) -> EncoderWeights:
        from mxn.models.encoder import EncoderWeights

        embeddings = f"{self._prefix}embeddings."
        head_dense, head_out = self._head(spec)
        return EncoderWeights(
            tokens_VD=self._tensor(f"{embeddings}word_embeddings.weight"),
            positions_D=self._tensor(f"{embeddings}position_embeddings.weight"),
            token_types_D=self._tensor(f"{embeddings}token_type_embeddings.weight"),
            norm=self._norm(f"{embeddings}LayerNorm"),
            layers=tuple(self._layer(i) for i in range(spec.num_layers)),
            projections=tuple(self._projection(files) for files in recipe.dense),
            head_dense=head_dense,
            head_out=head_out,
        )

    def _tensor(self, name: str) -> Tensor:
        return self._checkpoint.read(name).to(device=self._ops.device, dtype=self._ops.dtype)

    def _linear(self, *names: str) -> Linear:
        import torch

        weight = torch.cat([self._tensor(f"{name}.weight") for name in names])
        bias = torch.cat([self._tensor(f"{name}.bias") for name in names])
        return self._ops.prepare_linear(weight, bias)

    def _norm(self, name: str) -> Any:
        from mxn.models.encoder import NormWeights

        # Checkpoints converted from TensorFlow call the two tensors gamma and beta.
        old = f"{name}.gamma" in self._checkpoint
        weight, bias = ("gamma", "beta") if old else ("weight", "bias")
        return NormWeights(self._tensor(f"{name}.{weight}"), self._tensor(f"{name}.{bias}"))

    def _layer(self, index: int) -> EncoderLayerWeights:
        from mxn.models.encoder import EncoderLayerWeights

        layer = f"{self._prefix}encoder.layer.{index}."
        attention = f"{layer}attention."
        return EncoderLayerWeights(
            qkv=self._linear(*(f"{attention}self.{part}" for part in ("query", "key", "value"))),
            attn_out=self._linear(f"{attention}output.dense"),
            attn_norm=self._norm(f"{attention}output.LayerNorm"),
            up=self._linear(f"{layer}intermediate.dense"),
            down=self._linear(f"{layer}output.dense"),
            ffn_norm=self._norm(f"{layer}output.LayerNorm"),
        )

    def _head(self, spec: EncoderSpec) -> tuple[Linear | None, Linear | None]:
        if spec.head == "none":
            return None, None
        if spec.head == "pooler":
            return self._linear(f"{self._prefix}pooler.dense"), self._linear("classifier")
        return self._linear("classifier.dense"), self._linear("classifier.out_proj")

    def _projection(self, files: DenseFiles) -> Any:
        from mxn.models.encoder import DenseWeights

        dense = Checkpoint(files.directory)
        reader = _Reader(dense, self._ops, "")
        has_bias = "linear.bias" in dense
        weight = reader._tensor("linear.weight")
        bias = reader._tensor("linear.bias") if has_bias else None
        self._checkpoint.num_parameters += dense.num_parameters
        return DenseWeights(self._ops.prepare_linear(weight, bias), files.has_tanh)


ENCODER_FAMILIES = (
    EncoderFamily("bert", ("bert",), ("Bert",), "bert.", "pooler", False),
    EncoderFamily(
        "roberta", ("roberta", "camembert"), ("Roberta", "Camembert"), "roberta.", "roberta", True
    ),
    EncoderFamily(
        "xlm-roberta", ("xlm-roberta",), ("XLMRoberta",), "roberta.", "roberta", True
    ),
)  # fmt: skip

# Heads whose body serves embeddings: sentence-transformers loads the body of any of them.
_EMBEDDER_HEADS = ("Model", "ForMaskedLM", "ForPreTraining")
_RERANKER_HEAD = "ForSequenceClassification"


def find_encoder(config_json: dict[str, Any]) -> EncoderFamily | None:
    """Return the family that reads this config.json as an encoder, or None.

    A config that names no architecture counts as an encoder by its model_type, unless it says that
    it is a decoder.
    """
    names = config_json.get("architectures") or []
    for family in ENCODER_FAMILIES:
        wanted = {p + h for p in family.class_prefixes for h in (*_EMBEDDER_HEADS, _RERANKER_HEAD)}
        if wanted & set(names):
            return family
        is_decoder = config_json.get("is_decoder", False)
        if not names and not is_decoder and config_json.get("model_type") in family.model_types:
            return family
    return None


def _is_reranker(config_json: dict[str, Any]) -> bool:
    return any(name.endswith(_RERANKER_HEAD) for name in config_json.get("architectures") or [])
