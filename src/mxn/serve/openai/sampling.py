"""A request's sampling parameters, joined with the checkpoint's defaults and checked.

Knows what chat and completions have in common; knows no prompts and no replicas.
"""

from __future__ import annotations

from typing import Any

from mxn.engine.protocol import ModelInfo, SamplingParams
from mxn.serve.openai.errors import ApiError
from mxn.serve.openai.prompt_checks import check_ids
from mxn.serve.openai.types import SamplingRequest
from mxn.serve.served import GenerationDefaults

MAX_STOPS = 4
MAX_STOP_CHARS = 1000
_SMALLEST_TOP_P = 1e-6  # top_p 0 means the single best token; samplers divide by the kept mass


def build_sampling(
    request: SamplingRequest,
    defaults: GenerationDefaults,
    info: ModelInfo,
    *,
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Join a request with the checkpoint's defaults. Raises: ApiError with `param`."""
    if max_tokens is not None and (request.min_tokens or 0) > max_tokens:
        raise ApiError(
            f"min_tokens {request.min_tokens} is above max_tokens {max_tokens}.", param="min_tokens"
        )
    check_ids(request.stop_token_ids or (), info, "stop_token_ids")
    top_p = _or(request.top_p, defaults.top_p)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        temperature=_or(request.temperature, defaults.temperature),
        top_k=max(0, _or(request.top_k, defaults.top_k)),
        top_p=max(top_p, _SMALLEST_TOP_P),
        min_p=_or(request.min_p, defaults.min_p),
        repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        logit_bias=_logit_bias(request.logit_bias, info),
        seed=request.seed,
        stop=_stops(request.stop),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        include_stop_str=bool(request.include_stop_str_in_output),
        ignore_eos=bool(request.ignore_eos),
        skip_special_tokens=request.skip_special_tokens is not False,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise ApiError(f"At most {MAX_STOPS} stop strings, got {len(stops)}.", param="stop")
    for text in stops:
        if not 0 < len(text) <= MAX_STOP_CHARS:
            raise ApiError(
                f"A stop string has 1 to {MAX_STOP_CHARS} characters, got {len(text)}.",
                param="stop",
            )
    return stops


def _logit_bias(bias: dict[str, float] | None, info: ModelInfo) -> dict[int, float]:
    """Keep entries whose key is a token id; clients also send words, which mean nothing here."""
    if not bias:
        return {}
    numeric = {int(key): value for key, value in bias.items() if _is_id(key)}
    check_ids(numeric, info, "logit_bias")
    for value in numeric.values():
        if not -100 <= value <= 100:
            raise ApiError(
                f"A logit_bias is between -100 and 100, got {value}.", param="logit_bias"
            )
    return numeric


def _is_id(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) <= 10
