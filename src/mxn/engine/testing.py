"""Test doubles that are real: a tiny model over the paged cache, a byte tokenizer, and faults.

`TinyModel` is a true `CausalLM`: one layer of attention whose keys and values live in the pages it
is given, so a wrong page, slot, position or row changes its tokens. Its weights come from a seed;
it needs no checkpoint. Used by the engine's and the server's tests, on any torch device.

Start at `load_tiny`, a loader for `EngineConfig(loader="mxn.engine.testing:load_tiny")`; the model
"name" carries options: ``tiny?die_at=20&step_s=0.01``.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

import torch

from mxn.models.spec import KvShape

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.engine.config import EngineConfig
    from mxn.engine.load import LoadedReplica
    from mxn.kernels.batch import StepBatch
    from mxn.models.base import LayerCache

BOS_ID, EOS_ID = 256, 257


class ByteTokenizer:
    """Token i is byte i; 256 begins and 257 ends a text."""

    vocab_size = 258
    bos_ids = (BOS_ID,)
    eos_ids = (EOS_ID,)
    special_ids = frozenset((BOS_ID, EOS_ID))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the UTF-8 bytes of `text`, after a 256 if special tokens are wanted."""
        return ([BOS_ID] if add_special_tokens else []) + list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text; bytes that are no UTF-8 become U+FFFD, as with byte-level BPE."""
        names = {BOS_ID: b"<s>", EOS_ID: b"</s>"}
        special = {} if skip_special_tokens else names
        parts = [bytes((i,)) if i < 256 else special.get(i, b"") for i in ids]
        return b"".join(parts).decode(errors="replace")


@dataclass
class Faults:
    """What goes wrong, and when; counted in forward passes, 0 = never."""

    raise_at: int = 0  # RuntimeError
    oom_at: int = 0  # torch.OutOfMemoryError, once
    oom_over: int = 0  # torch.OutOfMemoryError for every step of more tokens than this
    die_at: int = 0  # SIGKILL to this very process
    exit_at: int = 0  # os._exit(3)
    step_s: float = 0.0  # each forward takes this much longer

    def before_forward(self, count: int, num_tokens: int) -> None:
        if self.step_s:
            time.sleep(self.step_s)
        if count == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if count == self.exit_at:
            os._exit(3)
        if count == self.raise_at:
            raise RuntimeError("injected fault in forward")
        if count == self.oom_at or (self.oom_over and num_tokens > self.oom_over):
            raise torch.OutOfMemoryError("injected: out of memory")


class TinyModel:
    """One layer of grouped-query attention over the paged cache; float32 pages, float64 arithmetic.

    Float64 so that the order of a sum, which depends on the size of the batch, cannot show in the
    logits: a request gives the same tokens alone, in a batch and prefilled in chunks.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        seed: int = 7,
        hidden: int = 32,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        vocab_size: int = 258,
        max_positions: int = 512,
        faults: Faults | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = torch.float32
        self.vocab_size = vocab_size
        self.max_positions = max_positions
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = hidden // num_heads
        self.faults = faults or Faults()
        self.num_forwards = 0
        self.kv_shapes = (
            KvShape(num_heads=num_kv_heads, k_dim=self.head_dim, v_dim=self.head_dim),
        )
        generator = torch.Generator().manual_seed(seed)

        def weight(rows: int, columns: int) -> Tensor:
            rows_f64 = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
            return rows_f64.to(self.device)

        kv_dim = num_kv_heads * self.head_dim
        self.embedding_VD = weight(vocab_size, hidden)
        self.position_PD = weight(97, hidden)  # a prime: no period in step with the pages
        self.q_DD = weight(hidden, hidden) / hidden**0.5
        self.k_DE = weight(hidden, kv_dim) / hidden**0.5
        self.v_DE = weight(hidden, kv_dim) / hidden**0.5
        self.out_DV = weight(hidden, vocab_size)

    @property
    def num_parameters(self) -> int:
        tensors = (
            self.embedding_VD,
            self.position_PD,
            self.q_DD,
            self.k_DE,
            self.v_DE,
            self.out_DV,
        )
        return sum(tensor.numel() for tensor in tensors)

    def forward(self, batch: StepBatch, cache: list[LayerCache]) -> Tensor:
        """Write keys and values, attend, and return logits [R, V], float32."""
        self.num_forwards += 1
        self.faults.before_forward(self.num_forwards, len(batch.token_ids_T))
        x_TD = self.embedding_VD[batch.token_ids_T] + self.position_PD[batch.positions_T % 97]
        attention = batch.attention
        k_pages, v_pages = cache[0].k, cache[0].v
        assert v_pages is not None, "TinyModel has a value cache"
        heads = (-1, self.num_kv_heads, self.head_dim)
        page, offset = (
            attention.slots_T // attention.page_tokens,
            attention.slots_T % attention.page_tokens,
        )
        k_pages[page, offset] = (x_TD @ self.k_DE).view(heads).float()
        v_pages[page, offset] = (x_TD @ self.v_DE).view(heads).float()
        y_TD = torch.empty_like(x_TD)
        for s in range(attention.num_sequences):
            rows = slice(attention.query_starts[s], attention.query_starts[s + 1])
            y_TD[rows] = x_TD[rows] + self._attend(x_TD[rows], batch, s, k_pages, v_pages)
        if batch.logits_rows_R is not None:
            y_TD = y_TD[batch.logits_rows_R]
        return (y_TD @ self.out_DV).float()

    def _attend(
        self, x_QD: Tensor, batch: StepBatch, s: int, k_pages: Tensor, v_pages: Tensor
    ) -> Tensor:
        """Return what the new tokens of sequence `s` see, [Q, D], reading its pages."""
        attention = batch.attention
        context, num_new = attention.context_lens[s], len(x_QD)
        pages = attention.page_table_SP[s, : -(-context // attention.page_tokens)]
        group = self.num_heads // self.num_kv_heads
        k_CNH = k_pages[pages].flatten(0, 1)[:context].double().repeat_interleave(group, dim=1)
        v_CNH = v_pages[pages].flatten(0, 1)[:context].double().repeat_interleave(group, dim=1)
        q_QNH = (x_QD @ self.q_DD).view(num_new, self.num_heads, self.head_dim)
        scores_NQC = torch.einsum("qnh,cnh->nqc", q_QNH, k_CNH) / self.head_dim**0.5
        positions_C = torch.arange(context, device=self.device)
        hidden_QC = positions_C[None] > positions_C[context - num_new :, None]
        weights_NQC = torch.softmax(scores_NQC.masked_fill(hidden_QC, -torch.inf), dim=-1)
        return torch.einsum("nqc,cnh->qnh", weights_NQC, v_CNH).flatten(1)


class TinyEncoder:
    """Mean of the token embeddings: enough to see that each sequence gets its own row."""

    def __init__(
        self, device: torch.device | str = "cpu", *, seed: int = 7, hidden: int = 16
    ) -> None:
        self.device = torch.device(device)
        self.dtype = torch.float32
        self.max_positions = 64
        self.vocab_size = 258
        generator = torch.Generator().manual_seed(seed)
        self.embedding_VD = torch.randn(258, hidden, generator=generator).to(self.device)
        self.num_parameters = self.embedding_VD.numel()
        self.batches: list[list[int]] = []  # the lengths of each batch it was given

    def encode(
        self, sequences: list[list[int]], token_types: list[list[int]] | None = None
    ) -> Tensor:
        """Return float32 [len(sequences), D]."""
        self.batches.append([len(sequence) for sequence in sequences])
        rows = []
        for i, sequence in enumerate(sequences):
            x_TD = self.embedding_VD[torch.tensor(sequence, device=self.device)]
            if token_types:
                x_TD = x_TD * (1 + torch.tensor(token_types[i], device=self.device)[:, None])
            rows.append(x_TD.mean(0))
        return torch.stack(rows)


def torch_device(name: str) -> str:
    """Return the torch device of a device id, its backend loaded; ``auto`` is the CPU here."""
    if name in ("auto", "cpu"):
        return "cpu"
    from mxn.chips import find_device

    return find_device(name).torch_device


def load_tiny(config: EngineConfig, on_progress: Callable[[str, int, int], None]) -> LoadedReplica:
    """Load `TinyModel` (or `TinyEncoder` for a model named ``tiny-encoder``) as the engine does."""
    from mxn.engine.load import LoadedReplica
    from mxn.models.load import LoadedModel

    name, _, query = config.model.partition("?")
    options = {key: float(value) for key, value in parse_qsl(query)}
    if options.pop("refuse", 0):
        from mxn.errors import NotFoundError

        raise NotFoundError(f"no model at {config.model!r}", hint="this is a test")
    device = torch_device(config.device)
    on_progress("weights", 1, 2)
    model = (
        TinyEncoder(device)
        if name == "tiny-encoder"
        else TinyModel(device, faults=_faults(options))
    )
    is_decoder = isinstance(model, TinyModel)
    on_progress("weights", 2, 2)
    loaded = LoadedModel(
        model=model,
        kind="decoder" if is_decoder else "embedder",
        family="tiny",
        is_native=True,
        num_parameters=model.num_parameters,
        dtype="float32",
        max_context=model.max_positions,
        eos_ids=(EOS_ID,) if is_decoder else (),
    )
    return LoadedReplica(loaded=loaded, tokenizer=ByteTokenizer(), chip="test", device=model.device)


def load_bytes(config: EngineConfig, on_progress: Callable[[str, int, int], None]) -> LoadedReplica:
    """Load the checkpoint `config.model` in float32 or packed, as if its tokens were bytes.

    For checkpoints of random numbers, which have no tokenizer.
    """
    from pathlib import Path

    from mxn.chips import find_device
    from mxn.engine.load import LoadedReplica
    from mxn.kernels.native import formats
    from mxn.models.load import load_model

    device = find_device(config.device)
    torch_device = torch.device(device.torch_device)
    on_progress("weights", 1, 2)
    loaded = load_model(
        Path(config.model), device, "float32", prediction=config.speculation == "mtp",
        format=None if config.weights == "plain" else formats.parse(config.weights, config.kv),
    )  # fmt: skip
    on_progress("weights", 2, 2)
    return LoadedReplica(
        loaded=loaded, tokenizer=ByteTokenizer(), chip=device.chip, device=torch_device
    )


def _faults(options: dict[str, float]) -> Faults:
    step_s = options.pop("step_s", 0.0)
    return Faults(step_s=step_s, **{key: int(value) for key, value in options.items()})
