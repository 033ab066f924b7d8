"""OpenVINO GenAI through its continuous-batching pipeline, stepped request by request.

Runs in the peers' `openvino` environment on what `optimum-cli export openvino` wrote. Settings are
the defaults of the CPU plugin (activations quantized dynamically per group, int8 key-value cache)
but for the number of threads. Logits come from the same exported model compiled without paging,
because the pipeline gives none.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy
import openvino
import openvino_genai as genai
from protocol import Load, serve


class OpenVino:
    """Prefix caching is on: prompts of an earlier round are still there, new ones never are."""

    def load(self, load: Load) -> dict[str, Any]:
        self._load = load
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = -(-load.kv_tokens // 32) + 2 * load.max_sequences
        scheduler.max_num_seqs = max(load.max_sequences, 1)
        scheduler.max_num_batched_tokens = 2048
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        properties = {
            "INFERENCE_NUM_THREADS": load.threads, "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }  # fmt: skip
        self._pipe = genai.ContinuousBatchingPipeline(load.built, scheduler, "CPU", properties)
        self._number = 0
        return {
            "version": openvino.__version__, "genai": genai.__version__,
            "flags": " ".join(f"{name}={value}" for name, value in properties.items())
            + " paged attention, prefix caching, max_num_batched_tokens=2048",
        }  # fmt: skip

    def prefill(self, prompt: list[int]) -> float:
        started_s = time.perf_counter()
        handle = self._submit(prompt, 1)
        while self._pipe.has_non_finished_requests():
            self._pipe.step()
        seconds = time.perf_counter() - started_s
        self._tokens(handle, 1)
        return seconds

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        handles = [self._submit(prompt, steps + 1) for prompt in prompts]
        waiting = list(handles)
        while waiting:  # until each sequence has its first token
            self._pipe.step()
            waiting = [handle for handle in waiting if not handle.can_read()]
        for handle in handles:
            handle.read()  # `read_all` would wait for the end of the answer
        started_s = time.perf_counter()
        for _ in range(steps):
            self._pipe.step()
        seconds = time.perf_counter() - started_s
        if self._pipe.has_non_finished_requests():
            raise RuntimeError(f"{steps} steps did not make {steps} tokens for each sequence")
        return seconds

    def greedy(self, prompt: list[int], steps: int) -> list[int]:
        handle = self._submit(prompt, steps)
        while self._pipe.has_non_finished_requests():
            self._pipe.step()
        return self._tokens(handle, steps)

    def logits(self, prompt: list[int], is_last_only: bool) -> Any:
        if not hasattr(self, "_plain"):
            core = openvino.Core()
            path = Path(self._load.built) / "openvino_model.xml"
            settings = {"INFERENCE_NUM_THREADS": self._load.threads}
            self._plain = core.compile_model(path, "CPU", settings).create_infer_request()
        self._plain.reset_state()
        names = {name for port in self._plain.model_inputs for name in port.get_names()}
        length = len(prompt)
        inputs = {
            "input_ids": numpy.array([prompt], dtype=numpy.int64),
            "attention_mask": numpy.ones((1, length), dtype=numpy.int64),
            "position_ids": numpy.arange(length, dtype=numpy.int64)[None],
            "beam_idx": numpy.zeros(1, dtype=numpy.int32),
        }
        self._plain.infer({name: value for name, value in inputs.items() if name in names})
        found = self._plain.get_tensor("logits").data[0].astype(numpy.float32)
        return found[-1] if is_last_only else found

    def _submit(self, prompt: list[int], new_tokens: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos, config.do_sample = True, False
        self._number += 1
        ids = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
        return self._pipe.add_request(self._number, ids, config)

    def _tokens(self, handle: Any, wanted: int) -> list[int]:
        found = [token for output in handle.read_all() for token in output.generated_ids]
        if len(found) != wanted:
            raise RuntimeError(f"{len(found)} tokens came back, {wanted} were asked for")
        return found


if __name__ == "__main__":
    serve(OpenVino())
