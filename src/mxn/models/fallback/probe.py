"""Learns what each attention call of a model stores and sees, by one short pass through its own
code.

The pass runs under a registered attention function that computes plain masked attention, with a
mask function that classifies what the model asked for: transformers describes masks as functions
of indices, so they can be asked about positions far beyond the probe. Start at `probe_model`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from mxn.errors import UnsupportedError
from mxn.models.spec import KvShape

if TYPE_CHECKING:
    from torch import Tensor

Asked = Callable[["Tensor", "Tensor"], "Tensor"]

PROBE = "mxn_probe"
_FAR = 1 << 20  # beyond any window in use; masks are asked about this position

# Tensors that attention functions get without meaning more than q, k, v and the mask say.
_HARMLESS = {"s_aux", "position_ids", "cache_position", "position_embeddings"}


@dataclass(frozen=True, slots=True)
class Mask:
    """What one mask lets a token see: itself and what is before it, within the limits."""

    window: int | None = None
    chunk: int | None = None  # tokens see only their own block of `chunk` positions


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention call of a forward pass."""

    kv_shape: KvShape
    window: int | None
    chunk: int | None
    has_sinks: bool


@dataclass(slots=True)
class _Recorder:
    calls: list[AttentionCall] = field(default_factory=list)
    # By storage. Models may make masks that no layer uses, so an odd one waits for its first use.
    masks: dict[int, tuple[Mask | UnsupportedError, Tensor]] = field(default_factory=dict)


_recorder = _Recorder()


@dataclass(frozen=True, slots=True)
class Probe:
    """What one pass through the model showed."""

    calls: tuple[AttentionCall, ...]
    position_offset: int  # of the first token; RoBERTa counts from padding_idx + 1


def probe_model(model: Any, token_ids_T: Tensor) -> Probe:
    """Return the attention calls of `model` in order, and where its positions begin.

    Leaves the model set to the probe's attention.
    Raises: UnsupportedError when a call does what paged attention cannot.
    """
    register()
    model.set_attn_implementation(PROBE)
    calls, by_itself = _run(model, token_ids_T, None)
    padding = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    for offset in (0, (padding or 0) + 1):
        _, told = _run(model, token_ids_T, offset)
        if torch.allclose(told, by_itself, rtol=1e-3, atol=1e-3 * by_itself.abs().max().item()):
            return Probe(calls, offset)
    raise UnsupportedError("it does not take the positions of its tokens as an input")


def _run(model: Any, token_ids_T: Tensor, offset: int | None) -> tuple[Any, Tensor]:
    """One pass with positions from `offset`, or with those the model makes itself (None)."""
    global _recorder
    _recorder = _Recorder()
    options = {}
    if offset is not None:
        positions = torch.arange(len(token_ids_T), device=token_ids_T.device) + offset
        options["position_ids"] = positions[None]
    counting = CountedTokens(len(token_ids_T))
    try:
        with counting:
            output = model(input_ids=token_ids_T[None], use_cache=False, **options)
        if options and counting.places:
            raise UnsupportedError(
                f"its code counts the tokens of a step instead of using their positions"
                f" ({', '.join(counting.places)})"
            )
        return tuple(_recorder.calls), output.logits[0].float()
    finally:
        _recorder = _Recorder()


class CountedTokens(TorchFunctionMode):
    """Notes where model code numbers the tokens of a step, by `arange` or `cumsum` over them.

    In a flattened step such a number is not a position. The load-time check cannot see the mistake
    when the number only matters in long texts, as in Llama 4.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self._num_tokens = num_tokens
        self.places: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("arange", "cumsum") and (
            result.shape[-1] == self._num_tokens
        ):
            code = sys._getframe(1)
            path = code.f_code.co_filename.replace("\\", "/")
            if "/modeling_" in path:
                self.places.append(f"{path.rsplit('/', 1)[-1]}:{code.f_lineno}")
        return result


def register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PROBE, probe_attention_forward)
    AttentionMaskInterface.register(PROBE, probe_mask)


def probe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Any,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    q_offset: int = 0,
    kv_offset: int = 0,
    **_: Any,
) -> Tensor:
    """Return an additive mask [B, 1, Q, K] and remember what kind it is."""
    try:
        kind: Mask | UnsupportedError = classify(mask_function, device)
    except UnsupportedError as odd:
        kind = odd
    query = torch.arange(q_offset, q_offset + q_length)[:, None].to(device)
    key = torch.arange(kv_offset, kv_offset + kv_length)[None, :].to(device)
    allowed = _ask(mask_function, query, key)
    zero = torch.zeros((), dtype=dtype, device=device)
    mask = torch.where(allowed, zero, torch.finfo(dtype).min)
    mask = mask.expand(batch_size, 1, q_length, kv_length).contiguous()
    _recorder.masks[mask.untyped_storage().data_ptr()] = (kind, mask)
    return mask


def classify(mask_function: Any, device: torch.device | str = "cpu") -> Mask:
    """Return what an index function lets tokens see. Raises: UnsupportedError if none of ours.

    `device`: where the tensors are that the function may hold, such as the padding of chunks.
    """

    def asked(query: Tensor, key: Tensor) -> Tensor:
        return _ask(mask_function, query.to(device), key.to(device)).cpu()

    try:
        far, far_before, near = (_seen(asked, at) for at in (_FAR, _FAR - 3, 5))
        if far is None or far_before is None or near is None:
            raise UnsupportedError("its mask is not causal: later tokens seen, or gaps before")
        if (far, far_before, near) == (_FAR + 1, _FAR - 2, 6):
            return Mask()
        if far == far_before and near == min(far, 6):
            return Mask(window=far)
        return Mask(chunk=_chunk_size(asked, _FAR + 1 - far))
    except (IndexError, RuntimeError, TypeError) as error:
        raise UnsupportedError(f"its mask depends on more than positions ({error})") from error


def _seen(asked: Asked, at: int) -> int | None:
    """How many positions up to `at` the token there sees; None unless they are its last ones."""
    allowed = asked(torch.tensor([[at]]), torch.arange(at + 4)[None])[0]
    count = int(allowed.sum())
    is_suffix = bool(allowed[at + 1 - count : at + 1].all()) and not bool(allowed[at + 1 :].any())
    return count if count and is_suffix else None


def _ask(mask_function: Any, query: Tensor, key: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.int64, device=query.device)
    allowed = mask_function(zero, zero, query, key)
    allowed = torch.as_tensor(allowed, dtype=torch.bool)
    return allowed.expand(torch.broadcast_shapes(query.shape, key.shape))


def _chunk_size(asked: Asked, start: int) -> int:
    """The chunk that begins at `start` was found; the one before it tells the size."""
    size = _seen(asked, start - 1) or 0
    probes = (5, start, start + size - 1, start + size)
    if size and all(_seen(asked, at) == at % size + 1 for at in probes):
        return size
    raise UnsupportedError("its mask is neither causal, nor a sliding window, nor chunks")


def probe_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Record the call and compute it plainly. Result [1, T, N, J]."""
    _refuse_odd_calls(query, key, kwargs)
    mask = _mask_of_call(module, attention_mask, kwargs)
    shape = KvShape(num_heads=key.shape[1], k_dim=key.shape[-1], v_dim=value.shape[-1])
    _recorder.calls.append(AttentionCall(shape, mask.window, mask.chunk, s_aux is not None))
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    length = scores.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~causal, torch.finfo(scores.dtype).min)
    if attention_mask is not None:
        scores = scores + attention_mask[..., :length].float()
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(-1)[..., :length]
    return (weights @ value.float()).to(query.dtype).transpose(1, 2).contiguous(), None


def _mask_of_call(module: Any, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> Mask:
    if attention_mask is not None:
        found = _recorder.masks.get(attention_mask.untyped_storage().data_ptr())
        if found is None:
            raise UnsupportedError("it computes an attention mask of its own")
        if isinstance(found[0], UnsupportedError):
            raise found[0]
        return found[0]
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal:
        raise UnsupportedError("it attends in both directions")
    return Mask(window=kwargs.get("sliding_window"))


def _refuse_odd_calls(query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise UnsupportedError(
            f"it attends with queries {tuple(query.shape)} over keys {tuple(key.shape)}:"
            " not the new tokens of one sequence"
        )
    for name, argument in kwargs.items():
        if isinstance(argument, torch.Tensor) and name not in _HARMLESS:
            raise UnsupportedError(f"its attention takes {name!r}, which paged attention has not")
