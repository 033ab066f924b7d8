"""The three kinds of plan layers: the embedding, a block, the head.

Each is one `nn.Module` whose parameters have their checkpoint's names behind `prefix`. Knows no
cuts and no devices. Shape letters: R rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mxn.models.names import Names
from mxn.models.spec import DecoderSpec, LayerSpec
from mxn.train.run.data.batch import MicroBatch
from mxn.train.run.net.attention import make_attention
from mxn.train.run.net.context import Context
from mxn.train.run.net.feedforward import make_feedforward
from mxn.train.run.net.losses import sum_of_losses
from mxn.train.run.net.parts import Make, RmsNorm, Table, Tree, put


class Embedding(nn.Module):
    """Plan layer 0."""

    def __init__(self, model: DecoderSpec, names: Names, make: Make) -> None:
        super().__init__()
        self.prefix = ""
        self._model = model
        self._table = [put(self, names.embedding, Table(make, model.vocab_size, model.hidden))]

    @property
    def weight(self) -> nn.Parameter:
        return self._table[0].weight

    def forward(self, ids_RT: Tensor) -> Tensor:
        x = nn.functional.embedding(ids_RT, self.weight)
        scale = self._model.embedding_scale
        if scale != 1.0:
            # Rounded to the compute dtype first, as the reference implementations do.
            x = x * torch.tensor(scale, dtype=x.dtype).item()
        return x


class Block(nn.Module):
    """Plan layers 1 to L: attention and feed-forward on the residual stream."""

    def __init__(
        self, model: DecoderSpec, spec: LayerSpec, names: Names, index: int, make: Make
    ) -> None:
        super().__init__()
        self.prefix = names.layer.format(i=index)
        self.spec = spec
        tree = Tree(self, self.prefix, model, make)
        # Attributes have an underscore: the other names belong to the checkpoint.
        pre, post = spec.has_pre_norm, spec.has_post_norm
        self._norms: dict[str, RmsNorm | None] = {
            "pre_attn": tree.norm(names.pre_attn_norm, model.hidden) if pre else None,
        }
        self._attention = make_attention(spec.attention, names, tree)
        self._norms["post_attn"] = tree.norm(names.post_attn_norm, model.hidden) if post else None
        self._norms["pre_ffn"] = tree.norm(names.pre_ffn_norm, model.hidden) if pre else None
        self._feedforward = make_feedforward(spec.ffn, names, tree)
        self._norms["post_ffn"] = tree.norm(names.post_ffn_norm, model.hidden) if post else None

    def recompute_attention(self) -> None:
        """Compute attention matrices again in the backward pass instead of keeping them."""
        self._attention.recomputes = True

    def forward(self, x: Tensor, context: Context) -> Tensor:
        scale = self.spec.residual_scale
        branch = self._attention(self._normed("pre_attn", x), context)
        x = torch.add(x, self._normed("post_attn", branch), alpha=scale)
        branch = self._feedforward(self._normed("pre_ffn", x))
        return torch.add(x, self._normed("post_ffn", branch), alpha=scale)

    def _normed(self, which: str, x: Tensor) -> Tensor:
        norm = self._norms[which]
        return x if norm is None else norm(x)


class Head(nn.Module):
    """Plan layer L + 1: the final norm and the output projection.

    The matrix is called `names.head` also where the model's is tied to the embedding: then this
    stage trains a copy, or shares the embedding's parameter when it holds that layer too.
    """

    def __init__(self, model: DecoderSpec, names: Names, make: Make) -> None:
        super().__init__()
        self.prefix = ""
        self._model = model
        tree = Tree(self, "", model, make)
        self._parts = (
            tree.norm(names.final_norm, model.hidden),
            tree.linear(names.head, model.hidden, model.vocab_size),
        )

    @property
    def weight(self) -> nn.Parameter:
        return self._parts[1].weight

    def share(self, weight_VD: nn.Parameter) -> None:
        """Use the embedding's matrix."""
        self._parts[1].weight = weight_VD

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits [..., V], float32, of hidden states [..., D]."""
        return self._project(self._parts[0](x))

    def forward(self, x_RTD: Tensor, batch: MicroBatch) -> Tensor:
        """Return the sum of the token losses."""
        return sum_of_losses(
            x_RTD.flatten(0, 1),
            batch.labels.flatten(),
            self.logits,
            vocab_size=self._model.vocab_size,
            num_tokens=batch.num_tokens,
        )

    def _project(self, normed: Tensor) -> Tensor:
        logits = self._parts[1](normed).float()
        if self._model.logit_scale != 1.0:
            logits = logits * self._model.logit_scale
        if self._model.logit_softcap is not None:
            cap = self._model.logit_softcap
            logits = torch.tanh(logits / cap) * cap
        return logits
