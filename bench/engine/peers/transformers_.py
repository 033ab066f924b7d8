"""Plain transformers: SDPA attention, its dynamic cache, one process. Also the float32 truth.

Runs in the environment that runs the benchmark. "rounded-8" and "rounded-4" are float32 with
rounded weights, the yardstick of `accuracy.py`. In decode the caches are filled by a real prefill
and cut back to the prompt after each call.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from protocol import Load, Refused, serve
from rounding import round_model
from transformers import AutoModelForCausalLM, DynamicCache

_DTYPES = {
    "bf16": torch.bfloat16, "f32": torch.float32, "rounded-8": torch.float32,
    "rounded-4": torch.float32,
}  # fmt: skip
_CHUNK = 512  # tokens of a prompt at a time: the float32 scores of 8,192 at once would not fit


class Transformers:
    def load(self, load: Load) -> dict[str, Any]:
        import transformers

        if load.weights not in _DTYPES:
            raise Refused(f"no format {load.weights!r}; there are {', '.join(_DTYPES)}")
        torch.set_num_threads(load.threads)
        torch.set_grad_enabled(False)
        self._model = AutoModelForCausalLM.from_pretrained(
            load.model, dtype=_DTYPES[load.weights], attn_implementation="sdpa"
        ).eval()
        if load.weights.startswith("rounded-"):
            round_model(self._model, int(load.weights[-1]))
        self._filled: dict[tuple[int, ...], Any] = {}
        versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
        return {"version": versions, "flags": f"sdpa, {load.weights}"}

    def prefill(self, prompt: list[int]) -> float:
        started_s = time.perf_counter()
        logits = self._model(torch.tensor([prompt]), logits_to_keep=1).logits
        int(logits[0, -1].argmax())
        return time.perf_counter() - started_s

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        length = len(prompts[0]) - 1
        cache = self._cache(prompts, length)
        ids = torch.tensor([[prompt[-1]] for prompt in prompts])
        started_s = time.perf_counter()
        for _ in range(steps):
            logits = self._model(ids, past_key_values=cache, use_cache=True).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
        seconds = time.perf_counter() - started_s
        cache.crop(-steps)
        return seconds

    def greedy(self, prompt: list[int], steps: int) -> list[int]:
        out = self._model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=steps, min_new_tokens=steps,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return out[0, len(prompt) :].tolist()

    def logits(self, prompt: list[int], is_last_only: bool) -> Any:
        keep = 1 if is_last_only else 0
        found = self._model(torch.tensor([prompt]), logits_to_keep=keep).logits[0].float().numpy()
        return found[-1] if is_last_only else found

    def _cache(self, prompts: list[list[int]], length: int) -> Any:
        key = (len(prompts), length, prompts[0][0])
        if key not in self._filled:
            cache = self._filled[key] = DynamicCache(config=self._model.config)
            for start in range(0, length, _CHUNK):
                part = [prompt[start : min(start + _CHUNK, length)] for prompt in prompts]
                self._model(torch.tensor(part), past_key_values=cache, logits_to_keep=1)
        return self._filled[key]


if __name__ == "__main__":
    serve(Transformers())
