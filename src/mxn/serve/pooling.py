"""Runs embedders and rerankers for the routes that need vectors or scores. Knows no JSON shapes.

Scores: a reranker's single logit through a sigmoid; for an embedder, the cosine of both vectors.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from mxn.engine.protocol import Encode, Encoded
from mxn.errors import UnsupportedError
from mxn.serve.http import unless_gone
from mxn.serve.metering import Meter, reason_of
from mxn.serve.metrics import Trace
from mxn.serve.openai.generation import chips_of
from mxn.serve.openai.prompt_checks import check_length, check_prompt
from mxn.serve.served import ServedModel
from mxn.serve.state import State, new_id

Vectors = NDArray[np.float32]
_THREAD_CHARS = 16_384  # texts longer than this in all are tokenized off the event loop


@dataclass(frozen=True, slots=True)
class Scores:
    values: list[float]
    prompt_tokens: int


async def tokenize_inputs(
    model: ServedModel, inputs: Sequence[str | list[int]], param: str
) -> list[list[int]]:
    """Return token ids for each text; token ids pass through. Raises: ApiError 400."""

    def tokenize() -> list[list[int]]:
        return [model.tokenizer.encode(i) if isinstance(i, str) else i for i in inputs]

    for position, item in enumerate(inputs):
        if isinstance(item, str):
            name = param if len(inputs) == 1 else f"{param}[{position}]"
            check_length(item, model, name)
    is_long = sum(len(item) for item in inputs) > _THREAD_CHARS
    sequences = await asyncio.to_thread(tokenize) if is_long else tokenize()
    for position, ids in enumerate(sequences):
        name = param if len(sequences) == 1 else f"{param}[{position}]"
        check_prompt(ids, model.info, max_tokens=0, param=name)
    return sequences


async def encode(
    request: Request,
    state: State,
    model: ServedModel,
    sequences: list[list[int]],
    token_types: list[list[int]] | None = None,
    *,
    answer_id: str | None = None,
) -> Encoded:
    """Run the replica, counted in the metrics and cancelled when the client goes away.

    `answer_id`: what the client sees, if anything; the row in the ledger has it too.
    """
    trace = Trace(state.metrics.model(model.name))
    message = Encode(
        request_id=answer_id or new_id("embd"), sequences=sequences, token_types=token_types
    )
    outcome = "client_gone"
    meter = await Meter.open(
        message.request_id,
        model=model.name,
        base=model.parent or "",
        chips=chips_of(model.client),
        input_tokens=sum(len(ids) for ids in sequences),
    )
    try:
        encoded = await unless_gone(request, model.client.encode(message))
        trace.prompt_tokens = encoded.prompt_tokens
        device_us = round(1e6 * encoded.device_s)
        await meter.settle("complete", input_tokens=encoded.prompt_tokens, device_us=device_us)
        outcome = "stop"
    except BaseException as exc:
        outcome = "error" if isinstance(exc, Exception) else outcome
        reason, status = reason_of(exc)
        await meter.settle(reason, status=status)  # nothing has left
        raise
    finally:
        trace.close(outcome)
    return encoded


async def score_pairs(
    request: Request,
    state: State,
    model: ServedModel,
    pairs: Sequence[tuple[str, str]],
    param: str,
    answer_id: str,
) -> Scores:
    """Return one score for each pair, in order. Raises: ApiError 400 for a pair too long."""
    if model.info.kind == "embedder":
        return await _cosines(request, state, model, pairs, param, answer_id)
    for position, (first, second) in enumerate(pairs):
        check_length(first, model, f"{param}[{position}]")
        check_length(second, model, f"{param}[{position}]")
    encoded_pairs = await _tokenize_pairs(model, pairs)
    for position, (ids, _) in enumerate(encoded_pairs):
        check_prompt(ids, model.info, max_tokens=0, param=f"{param}[{position}]")
    sequences, types = [list(part) for part in zip(*encoded_pairs, strict=True)]
    encoded = await encode(request, state, model, sequences, types, answer_id=answer_id)
    return Scores([_sigmoid(_logit(row)) for row in encoded.rows], encoded.prompt_tokens)


async def _tokenize_pairs(
    model: ServedModel, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    def tokenize() -> list[tuple[list[int], list[int]]]:
        return [model.tokenizer.encode_pair(first, second) for first, second in pairs]

    is_long = sum(len(first) + len(second) for first, second in pairs) > _THREAD_CHARS
    return await asyncio.to_thread(tokenize) if is_long else tokenize()


async def _cosines(
    request: Request,
    state: State,
    model: ServedModel,
    pairs: Sequence[tuple[str, str]],
    param: str,
    answer_id: str,
) -> Scores:
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    place = {text: position for position, text in enumerate(texts)}
    sequences = await tokenize_inputs(model, texts, param)
    encoded = await encode(request, state, model, sequences, answer_id=answer_id)
    vectors = normalized(np.stack([vector(row) for row in encoded.rows]))
    values = [float(vectors[place[first]] @ vectors[place[second]]) for first, second in pairs]
    return Scores(values, encoded.prompt_tokens)


def vector(row: bytes) -> Vectors:
    """Return a row of the replica as float32."""
    return np.frombuffer(row, dtype="<f4")


def normalized(vectors: Vectors) -> Vectors:
    """Scale to length 1 over the last dim; a zero vector stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype("<f4")


def _logit(row: bytes) -> float:
    values = vector(row)
    if len(values) != 1:
        raise UnsupportedError(
            f"this reranker gives {len(values)} labels for a pair; scoring needs exactly 1",
            hint="serve a checkpoint with num_labels 1",
        )
    return float(values[0])


def _sigmoid(logit: float) -> float:
    # Two forms, so that exp never overflows.
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit))
