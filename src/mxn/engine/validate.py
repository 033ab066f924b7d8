"""Checks a generation request before anything is spent on it. Pure. Start at `problem_of`."""

from __future__ import annotations

import math

from mxn.engine.protocol import Generate, ModelInfo, SamplingParams

MAX_STOP_STRINGS = 64


def problem_of(request: Generate, info: ModelInfo) -> tuple[str, str | None] | None:
    """Return (message, OpenAI error code) for a request that cannot run, or None when it can."""
    ids, limit = request.prompt_ids, info.max_context
    if not ids:
        return "the prompt is empty: at least one token is needed", None
    if len(ids) >= limit:
        return (
            f"the prompt has {len(ids)} tokens, the context is {limit} tokens and the answer needs "
            f"at least one of them\nhint: send at most {limit - 1} tokens"
        ), "context_length_exceeded"
    outside = _first_outside(ids, info.vocab_size)
    if outside is not None:
        return f"token id {outside} is outside the vocabulary of {info.vocab_size}", None
    if request.resume_ids:
        outside = _first_outside(request.resume_ids, info.vocab_size)
        if outside is not None:
            return f"token id {outside} to resume from is outside the vocabulary", None
    sampling = request.sampling
    problem = _sampling_problem(sampling, info.vocab_size)
    if problem is None and sampling.min_tokens:
        ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else info.eos_ids)}
        if len(ends) >= info.vocab_size:  # none of them may come before min_tokens
            problem = f"min_tokens {sampling.min_tokens} leaves no token: each one ends the answer"
    return (problem, None) if problem else None


def _first_outside(ids: list[int], vocab_size: int) -> int | None:
    if min(ids) >= 0 and max(ids) < vocab_size:
        return None
    return next(i for i in ids if not 0 <= i < vocab_size)


def _sampling_problem(p: SamplingParams, vocab_size: int) -> str | None:
    """Return what is wrong with the sampling values: name, value and range."""
    ranges = (
        ("temperature", p.temperature, p.temperature >= 0, "at least 0"),
        ("top_k", p.top_k, p.top_k >= 0, "at least 0 (0 is off)"),
        ("top_p", p.top_p, 0 < p.top_p <= 1, "in (0, 1]"),
        ("min_p", p.min_p, 0 <= p.min_p <= 1, "in [0, 1]"),
        ("repetition_penalty", p.repetition_penalty, p.repetition_penalty > 0, "above 0"),
        ("frequency_penalty", p.frequency_penalty, abs(p.frequency_penalty) <= 2, "in [-2, 2]"),
        ("presence_penalty", p.presence_penalty, abs(p.presence_penalty) <= 2, "in [-2, 2]"),
        ("max_tokens", p.max_tokens, p.max_tokens is None or p.max_tokens >= 0, "at least 0"),
        ("min_tokens", p.min_tokens, p.min_tokens >= 0, "at least 0"),
        ("logprobs", p.logprobs, _is_count(p.logprobs, vocab_size), f"in [0, {vocab_size}]"),
        (
            "prompt_logprobs",
            p.prompt_logprobs,
            _is_count(p.prompt_logprobs, vocab_size),
            f"in [0, {vocab_size}]",
        ),
    )
    for name, value, is_good, allowed in ranges:
        if not is_good or (isinstance(value, float) and not math.isfinite(value)):
            return f"{name} must be {allowed}, got {value!r}"
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        return f"min_tokens {p.min_tokens} is more than max_tokens {p.max_tokens}"
    if len(p.stop) > MAX_STOP_STRINGS or not all(p.stop):
        return f"stop takes at most {MAX_STOP_STRINGS} strings, none of them empty, got {p.stop!r}"
    return _bias_problem(p.logit_bias, vocab_size)


def _bias_problem(bias: dict[int, float], vocab_size: int) -> str | None:
    for token_id, value in bias.items():
        if not 0 <= token_id < vocab_size:
            return f"logit_bias names token id {token_id}, the vocabulary has {vocab_size}"
        if not -100 <= value <= 100:
            return f"logit_bias of token {token_id} must be in [-100, 100], got {value!r}"
    return None


def _is_count(value: int | None, limit: int) -> bool:
    return value is None or 0 <= value <= limit
