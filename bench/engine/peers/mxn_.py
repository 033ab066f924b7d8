"""mxn itself, in this process: `build_engine` and its step loop, nothing around them.

Runs in the environment that runs the benchmark. Prefix caching keeps the prompts of earlier
rounds, as OpenVINO's does; new prompts are in no cache.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from protocol import Load, Refused, serve

from mxn.engine.config import EngineConfig
from mxn.engine.local import LocalEngine
from mxn.engine.protocol import Cancel, Delta, Failed, Generate, SamplingParams

_SETTING = "weights"  # the engine's setting for the formats of its native kernels


def settings(weights: str) -> dict[str, Any]:
    """Return the engine's settings for WEIGHTS or WEIGHTS/CACHE, such as int4-g128/int8.

    plain is the path without the native kernels. Raises: Refused where the engine has none.
    """
    name, _, cache = weights.partition("/")
    if name == "plain":
        return {}
    if _SETTING not in {field.name for field in dataclasses.fields(EngineConfig)}:
        raise Refused(f"EngineConfig has no setting {_SETTING!r} for {weights}")
    return {_SETTING: name} | ({"kv": cache} if cache else {})


class Mxn:
    def load(self, load: Load) -> dict[str, Any]:
        fields = settings(load.weights)
        config = EngineConfig(
            model=load.built, device="cpu", threads=load.threads, max_context=load.max_context,
            max_sequences=load.max_sequences, **fields,
        )  # fmt: skip
        self._engine = LocalEngine.load(config)
        self._core = self._engine.core
        self._number = 0
        import mxn

        return {
            "version": mxn.__version__, "flags": f"{fields}, prefix caching",
            "kernels": self._core.info.kernels,
        }  # fmt: skip

    def prefill(self, prompt: list[int]) -> float:
        started_s = time.perf_counter()
        self._submit(prompt, 1)
        self._tokens()
        return time.perf_counter() - started_s

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Return the seconds of `steps` steps in which each sequence gets a token.

        Prompts that do not fit one step begin one after the other, so the first ones are further
        when the clock starts, and all are cut when it stops.
        """
        names = {self._submit(prompt, steps + len(prompts) + 1) for prompt in prompts}
        waiting = set(names)
        while waiting:  # until each sequence has its first token
            waiting -= {reply.request_id for reply in self._step() if reply.token_ids}
        started_s = time.perf_counter()
        made = sum(len(reply.token_ids) for _ in range(steps) for reply in self._step())
        seconds = time.perf_counter() - started_s
        for name in names:
            self._core.handle(Cancel(request_id=name))
        self._tokens()
        if made != steps * len(prompts):
            raise RuntimeError(f"{steps} steps made {made} tokens for {len(prompts)} sequences")
        return seconds

    def greedy(self, prompt: list[int], steps: int) -> list[int]:
        self._submit(prompt, steps)
        return self._tokens()

    def logits(self, prompt: list[int], is_last_only: bool) -> Any:
        """The runner's own model on its own cache: what the sampler sees."""
        import numpy

        model, seen = self._core._runner._model, []
        forward = model.forward

        def recorded(*args: Any, **named: Any) -> Any:
            logits = forward(*args, **named)
            seen.append(logits.detach().float().numpy().copy())
            return logits

        model.forward = recorded
        try:
            wanted = None if is_last_only else 0
            self._submit(prompt, 1, prompt_logprobs=wanted)
            self._tokens()
        finally:
            del model.forward
        found = numpy.concatenate(seen)
        if is_last_only:
            return found[-1]
        if len(found) < len(prompt):
            raise Refused(f"the engine gave {len(found)} rows of logits for {len(prompt)} tokens")
        return found[: len(prompt)]

    def _submit(self, prompt: list[int], new_tokens: int, **more: Any) -> str:
        self._number += 1
        name = f"bench-{self._number}"
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, **more)
        message = Generate(request_id=name, prompt_ids=prompt, sampling=sampling)
        for reply in self._core.handle(message):
            if isinstance(reply, Failed):
                raise RuntimeError(reply.message)
        return name

    def _step(self) -> list[Delta]:
        replies = self._core.step()
        for reply in replies:
            if isinstance(reply, Failed):
                raise RuntimeError(reply.message)
        return [reply for reply in replies if isinstance(reply, Delta)]

    def _tokens(self) -> list[int]:
        found: list[int] = []
        while self._core.has_work:
            for reply in self._step():
                found += reply.token_ids
        return found


if __name__ == "__main__":
    serve(Mxn())
