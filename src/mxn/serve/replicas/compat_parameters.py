"""CompatParameters: what a request asks for, in the words of an OpenAI-compatible server.

Knows what kinds of servers take and lack; sends nothing and reads no answers.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mxn.engine.protocol import Encode, Generate, SamplingParams
from mxn.errors import UnsupportedError
from mxn.serve.replicas.upstream import Kind

# Names of our parameters in the body, where they differ.
_NAMES = {"include_stop_str": "include_stop_str_in_output"}
_LLAMA_NAMES = {"repetition_penalty": "repeat_penalty"}
_COUNT_PROMPT = frozenset({"vllm", "mxn", "llama.cpp"})  # for `repetition_penalty`
NO_PAIRS = "an OpenAI-compatible server does not score token pairs"
_DEFAULT = SamplingParams()
_DEFAULTS = msgspec.to_builtins(_DEFAULT)


class CompatParameters:
    """What one server takes. `name` is the server's, for messages."""

    def __init__(
        self,
        *,
        name: str,
        model: str,
        kind: Kind,
        max_context: int | None,
        capabilities: frozenset[str],
    ) -> None:
        self._name = name
        self._model = model
        self._kind = kind
        self._max_context = max_context
        self._capabilities = capabilities

    def lacks(self, request: Generate | Encode, *, resumes: bool = False) -> str | None:
        """Return why the server cannot take a request, in words; None: it can.

        `resumes`: the request comes with tokens made elsewhere, which the server takes for a part
        of the prompt.
        """
        if isinstance(request, Encode):
            return None if request.token_types is None else NO_PAIRS
        for name in SamplingParams.__struct_fields__:
            value = getattr(request.sampling, name)
            if name == "max_tokens" or value == getattr(_DEFAULT, name):
                continue
            if name not in self._capabilities:
                return self._without(name)
            if resumes and name in self._crossing:
                return f"the server {self._name} would begin {name!r} anew"
        return None

    @property
    def _crossing(self) -> frozenset[str]:
        """Parameters whose effect spans the tokens made elsewhere and those made here."""
        names = {"frequency_penalty", "presence_penalty"}
        if self._kind not in _COUNT_PROMPT:
            names.add("repetition_penalty")
        if "token_ids" not in self._capabilities:
            names.add("stop")  # it is the server that looks for them, in its own text only
        return frozenset(names)

    def body(self, request: Generate) -> dict[str, Any]:
        """Return the body of a request; what was made already is part of the prompt."""
        prompt = [*request.prompt_ids, *request.resume_ids]
        sampling = request.sampling
        body: dict[str, Any] = {"model": request.adapter or self._model, "prompt": prompt}
        body |= self._parameters(sampling)
        limit = self.limit(request)
        if limit is not None:  # their default is 16
            body["max_tokens"] = max(1, limit - len(request.resume_ids))
        if sampling.min_tokens:
            body["min_tokens"] = max(0, sampling.min_tokens - len(request.resume_ids))
        options: dict[str, bool] = {"include_usage": True}
        if "continuous_usage" in self._capabilities:
            options["continuous_usage_stats"] = True
        body |= {"stream": True, "stream_options": options}
        if "token_ids" in self._capabilities:
            body["return_token_ids"] = True
        if sampling.logprobs is not None:
            body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
        return body

    def limit(self, request: Generate) -> int | None:
        """Return how many tokens an answer may have, with those made already."""
        limit, context = request.sampling.max_tokens, self._max_context
        if limit is None and context is not None:
            limit = context - len(request.prompt_ids)
        return limit

    def _parameters(self, sampling: SamplingParams) -> dict[str, Any]:
        """Return the parameters that are not at their default. Raises: UnsupportedError."""
        out: dict[str, Any] = {"temperature": sampling.temperature}
        names = _LLAMA_NAMES if self._kind == "llama.cpp" else _NAMES
        for name, value in msgspec.to_builtins(sampling).items():
            if name == "max_tokens" or value == _DEFAULTS.get(name):
                continue
            if name not in self._capabilities:
                raise UnsupportedError(
                    self._without(name), hint="leave it out, or choose another replica"
                )
            out[names.get(name) or name] = value
        if "logit_bias" in out:
            out["logit_bias"] = {str(key): item for key, item in sampling.logit_bias.items()}
        return out

    def _without(self, name: str) -> str:
        return f"the server {self._name} ({self._kind}) has no parameter {name!r}"
