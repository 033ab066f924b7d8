"""Runs any encoder that an `EncoderSpec` describes: padded batches in, vectors or scores out.

Knows specs, weights and ops; knows nothing of checkpoints, tokenizers or requests. Start at
`Encoder.encode`. Shape letters: B sequences, L tokens of the longest one, D hidden size, N heads,
H head dim, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mxn.errors import CapacityError, UserError
from mxn.models.spec import EncoderSpec

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.kernels.registry import Ops

Linear = Callable[["Tensor"], "Tensor"]

# Padded tokens of one pass: enough to fill a chip, few enough that activations stay in a CPU cache.
PASS_TOKENS = 4_096


@dataclass(frozen=True, slots=True)
class NormWeights:
    weight_D: Tensor
    bias_D: Tensor


@dataclass(frozen=True, slots=True)
class EncoderLayerWeights:
    qkv: Linear  # D -> 3D: queries, keys, values
    attn_out: Linear
    attn_norm: NormWeights
    up: Linear
    down: Linear
    ffn_norm: NormWeights


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """A projection behind the pooling (sentence-transformers `Dense`)."""

    linear: Linear
    has_tanh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderWeights:
    tokens_VD: Tensor
    positions_D: Tensor
    token_types_D: Tensor
    norm: NormWeights
    layers: tuple[EncoderLayerWeights, ...]
    projections: tuple[DenseWeights, ...] = ()
    head_dense: Linear | None = None  # D -> D, then tanh
    head_out: Linear | None = None  # D -> C


class Encoder:
    """A BERT-like encoder, native to mxn. Implements `TextEncoder`."""

    def __init__(self, spec: EncoderSpec, weights: EncoderWeights, ops: Ops) -> None:
        self.spec = spec
        self.ops = ops
        self.max_positions = spec.max_positions
        self.vocab_size = spec.vocab_size
        self.dtype = ops.dtype
        self.device = ops.device
        self._weights = weights

    @torch.inference_mode()
    def encode(
        self, sequences: list[list[int]], token_types: list[list[int]] | None = None
    ) -> Tensor:
        """Return float32 [len(sequences), D] embeddings, or [len(sequences), C] logits.

        `token_types`: the segment of each token (0 or 1), for models that tell a question from a
        passage; all 0 when None. Sequences of similar length run together whatever their order.
        Raises: UserError for an empty sequence or an id outside the vocabulary; CapacityError for a
        sequence longer than `max_positions`.
        """
        token_types = token_types or [[0] * len(ids) for ids in sequences]
        self._check(sequences, token_types)
        if not sequences:
            return torch.empty(0, self.output_dim, device=self.device)
        order: list[int] = []
        parts = []
        for chosen in length_buckets([len(ids) for ids in sequences], PASS_TOKENS):
            order.extend(chosen)
            parts.append(
                self._pass([sequences[i] for i in chosen], [token_types[i] for i in chosen])
            )
        rank = {index: row for row, index in enumerate(order)}
        rows = torch.tensor([rank[i] for i in range(len(order))]).to(self.device)
        return torch.cat(parts)[rows]

    @property
    def output_dim(self) -> int:
        """Size of an embedding, or the number of labels."""
        return self.spec.num_labels or self.spec.embedding_dim or self.spec.hidden

    def _check(self, sequences: list[list[int]], token_types: list[list[int]]) -> None:
        if len(sequences) != len(token_types):
            raise UserError(
                f"{len(sequences)} sequences came with {len(token_types)} lists of token types"
            )
        for i, (ids, types) in enumerate(zip(sequences, token_types, strict=True)):
            if not ids:
                raise UserError(f"sequence {i} has no tokens", hint="send at least one token")
            if len(ids) > self.max_positions:
                raise CapacityError(
                    f"sequence {i} has {len(ids)} tokens, the model takes {self.max_positions}",
                    hint="truncate or split the text",
                )
            if len(types) != len(ids):
                raise UserError(f"sequence {i} has {len(ids)} tokens and {len(types)} token types")
            _check_ids(f"token id of sequence {i}", ids, self.spec.vocab_size)
            _check_ids(f"token type of sequence {i}", types, self.spec.num_token_types)

    def _pass(self, sequences: list[list[int]], token_types: list[list[int]]) -> Tensor:
        lengths = [len(ids) for ids in sequences]
        lengths_B = torch.tensor(lengths).to(self.device)
        x_BLD = self._embed(sequences, token_types, max(lengths))
        for layer in self._weights.layers:
            x_BLD = self._layer(x_BLD, layer, lengths_B)
        return self._score(x_BLD) if self.spec.num_labels else self._vector(x_BLD, lengths_B)

    def _embed(
        self, sequences: list[list[int]], token_types: list[list[int]], width: int
    ) -> Tensor:
        ops, weights = self.ops, self._weights
        ids_BL = padded(sequences, width, self.device)
        types_BL = padded(token_types, width, self.device)
        positions = [self._positions(ids) for ids in sequences]
        positions_BL = padded(positions, width, self.device)
        x_BLD = ops.embedding(ids_BL, weights.tokens_VD)
        x_BLD = x_BLD + ops.embedding(types_BL, weights.token_types_D)
        x_BLD = x_BLD + ops.embedding(positions_BL, weights.positions_D)
        return self._norm(x_BLD, weights.norm)

    def _positions(self, ids: list[int]) -> list[int]:
        """RoBERTa counts from `padding_idx + 1`; padding tokens inside a text stay at it."""
        offset = self.spec.position_offset
        if not offset or offset - 1 not in ids:
            return list(range(offset, offset + len(ids)))
        positions, next_position = [], offset
        for token_id in ids:
            is_padding = token_id == offset - 1
            positions.append(offset - 1 if is_padding else next_position)
            next_position += not is_padding
        return positions

    def _layer(self, x_BLD: Tensor, weights: EncoderLayerWeights, lengths_B: Tensor) -> Tensor:
        ops, heads = self.ops, self.spec.num_heads
        head_dim = self.spec.hidden // heads
        parts = weights.qkv(x_BLD).unflatten(-1, (3, heads, head_dim)).permute(2, 0, 3, 1, 4)
        q_BNLH, k_BNLH, v_BNLH = parts.unbind(0)
        mixed_BNLH = ops.dense_attention(q_BNLH, k_BNLH, v_BNLH, lengths_B, head_dim**-0.5)
        mixed_BLD = mixed_BNLH.transpose(1, 2).flatten(2)
        x_BLD = self._norm(x_BLD + weights.attn_out(mixed_BLD), weights.attn_norm)
        up_BLF = ops.activation(weights.up(x_BLD), self.spec.activation)
        return self._norm(x_BLD + weights.down(up_BLF), weights.ffn_norm)

    def _norm(self, x: Tensor, norm: NormWeights) -> Tensor:
        return self.ops.layer_norm(x, norm.weight_D, norm.bias_D, self.spec.norm_eps)

    def _vector(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        vectors_BD = self.ops.pool(x_BLD, lengths_B, self.spec.pooling)
        for projection in self._weights.projections:
            vectors_BD = projection.linear(vectors_BD)
            vectors_BD = torch.tanh(vectors_BD) if projection.has_tanh else vectors_BD
        vectors_BD = vectors_BD.float()
        return self.ops.l2_normalize(vectors_BD) if self.spec.is_normalized else vectors_BD

    def _score(self, x_BLD: Tensor) -> Tensor:
        assert self._weights.head_dense is not None
        assert self._weights.head_out is not None
        first_BD = torch.tanh(self._weights.head_dense(x_BLD[:, 0]))
        return self._weights.head_out(first_BD).float()


def _check_ids(what: str, ids: list[int], limit: int) -> None:
    if min(ids) < 0 or max(ids) >= limit:
        wrong = next(i for i in ids if not 0 <= i < limit)
        raise UserError(f"{what} is {wrong}, the model has 0 to {limit - 1}")


def padded(rows: list[list[int]], width: int, device: torch.device) -> Tensor:
    """Return int64 [len(rows), width], short rows filled with 0."""
    filled = [row + [0] * (width - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64).to(device)


def length_buckets(lengths: list[int], pass_tokens: int) -> Iterator[list[int]]:
    """Yield indices in groups of similar length, each at most `pass_tokens` when padded.

    A single sequence longer than `pass_tokens` is a group of its own.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and (len(group) + 1) * lengths[index] > pass_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
