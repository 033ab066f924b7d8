"""Refuses prompts that can never run, before they are queued: no tokens, unknown ones, too many.

Knows a model's limits; knows no sampling and no replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mxn.engine.protocol import ModelInfo
from mxn.serve.openai.errors import ApiError, context_exceeded
from mxn.serve.served import ServedModel


def check_ids(ids: Any, info: ModelInfo, param: str) -> None:
    """Refuse token ids that the model does not have. Raises: ApiError."""
    largest = max(ids, default=0)
    if largest >= info.vocab_size:
        raise ApiError(
            f"Token id {largest} is outside this model's vocabulary of {info.vocab_size} tokens.",
            param=param,
        )


def check_prompt(
    ids: Sequence[int], info: ModelInfo, *, max_tokens: int | None, param: str
) -> None:
    """Refuse an empty, impossible or over-long prompt before it is queued. Raises: ApiError."""
    if not ids:
        raise ApiError("The prompt is empty: it has no tokens.", param=param)
    check_ids(ids, info, param)
    wanted = 1 if max_tokens is None else max_tokens
    if len(ids) + wanted > info.max_context:
        error = context_exceeded(len(ids), max_tokens, info.max_context)
        error.param = param if len(ids) >= info.max_context else error.param
        raise error


def check_length(text: str, model: ServedModel, param: str) -> None:
    """Refuse a text that is too long in any case before it is tokenized. Raises: ApiError.

    It costs no time, unlike the tokens of 20 MB, which are seconds of a core. What passes is still
    checked by its tokens, with `check_prompt`.
    """
    at_least, limit = model.tokenizer.min_tokens(text), model.info.max_context
    if at_least > limit:
        raise ApiError(
            f"This model's context is {limit} tokens; the request needs at least {at_least} prompt "
            "tokens. Shorten the prompt.",
            param=param,
            code="context_length_exceeded",
            extra={"n_prompt_tokens": at_least, "n_ctx": limit},
        )
