"""The two attention functions that mxn registers with transformers.

`mxn_paged` writes keys and values into pages and attends through the ops; transformers gives it no
mask, because no mask function carries its name. Which step it works for is told by `running`,
since model code does not reliably pass extra arguments down. Knows ops and steps; knows no model
class.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mxn.errors import InternalError

if TYPE_CHECKING:
    from torch import Tensor

    from mxn.kernels.batch import AttentionBatch
    from mxn.kernels.registry import Ops
    from mxn.models.base import LayerCache
    from mxn.models.fallback.probe import AttentionCall

PAGED = "mxn_paged"


@dataclass(slots=True)
class Step:
    """One forward pass: the n-th attention call of the model takes the n-th cache."""

    ops: Ops
    batch: AttentionBatch
    cache: list[LayerCache]
    calls: tuple[AttentionCall, ...]
    next_call: int = 0


_local = threading.local()


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Make `step` the one that attention calls of this thread belong to."""
    _local.step = step
    try:
        yield
    finally:
        _local.step = None
    if step.next_call != len(step.calls):
        raise InternalError(
            f"the model made {step.next_call} attention calls, the load-time probe saw"
            f" {len(step.calls)}"
        )


def register() -> None:
    """Make `mxn_paged` known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(PAGED, paged_attention_forward)


def paged_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend over pages for one layer.

    Shapes: query [1, N, T, H], key [1, G, T, H], value [1, G, T, J]; result [1, T, N, J].
    The window is the one of the mask that the model asked transformers for, found by the probe: a
    `sliding_window` argument may be missing or be meant for another layer.
    """
    step: Step = _local.step
    call, cache = step.calls[step.next_call], step.cache[step.next_call]
    step.next_call += 1
    q_TNH, k_TGH, v_TGJ = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    step.ops.kv_write(k_TGH, v_TGJ, cache.k, cache.v, step.batch.slots_T)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if s_aux is not None:
        out_TNJ = attend_with_sinks(q_TNH, cache, step.batch, scale, call.window, s_aux)
    else:
        out_TNJ = step.ops.paged_attention(
            q_TNH, cache.k, cache.v, step.batch, scale, call.window, softcap
        )
    return out_TNJ.unsqueeze(0), None


def attend_with_sinks(
    q_TNH: Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    sinks_N: Tensor,
) -> Tensor:
    """Paged attention whose softmax has one more column per head, a learned logit without a value.

    Plain torch, one sequence at a time: no kernel of the contract has sinks. Result [T, N, J].
    """
    import torch

    assert cache.v is not None
    outputs = []
    for s in range(batch.num_sequences):
        rows_TNH = q_TNH[batch.query_starts[s] : batch.query_starts[s + 1]]
        context, new = batch.context_lens[s], len(rows_TNH)
        first = 0 if window is None else max(0, context - new - window + 1)
        first -= first % batch.page_tokens
        pages = batch.page_table_SP[s][first // batch.page_tokens :]
        k_CGH = cache.k[pages].flatten(0, 1)[: context - first].float()
        v_CGJ = cache.v[pages].flatten(0, 1)[: context - first].float()
        groups = k_CGH.shape[1]
        q_TGRH = rows_TNH.float().unflatten(1, (groups, -1))
        scores = torch.einsum("tgrh,cgh->grtc", q_TGRH, k_CGH) * scale
        query_at = torch.arange(context - new, context, device=scores.device)[:, None]
        key_at = torch.arange(first, context, device=scores.device)[None, :]
        hidden = key_at > query_at
        if window is not None:
            hidden = hidden | (key_at <= query_at - window)
        scores = scores.masked_fill(hidden, float("-inf"))
        sinks = sinks_N.float().view(groups, -1, 1, 1).expand(-1, -1, new, 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
        outputs.append(torch.einsum("grtc,cgj->tgrj", weights, v_CGJ).flatten(1, 2))
    return torch.cat(outputs).to(q_TNH.dtype)
