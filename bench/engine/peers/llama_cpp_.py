"""llama.cpp through its C interface (`llama.h`) and the ctypes declarations of llama-cpp-python.

Runs in the peers' `llama` environment; LLAMA_CPP_LIB_PATH names the library that `setup_peers.py`
built. Flash attention stays on automatic and the cache in f16, as in its tools. Knows tokens only.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy
from llama_cpp import llama_cpp as llama
from protocol import Load, Refused, serve

BATCH = 2048  # logical, and 512 physical: the defaults of llama.cpp's own tools


class LlamaCpp:
    """Keeps one context per set of prompts, so that later rounds need not fill it again."""

    def load(self, load: Load) -> dict[str, Any]:
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        self._model = llama.llama_model_load_from_file(load.built.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {load.built}")
        vocab = llama.llama_model_get_vocab(self._model)
        self._vocab_size = llama.llama_vocab_n_tokens(vocab)
        self._threads = load.threads
        self._filled: dict[tuple[int, ...], Any] = {}
        self._short = self._context(min(load.max_context, 1024), 1)
        self._batch = llama.llama_batch_init(BATCH, 0, 1)
        return {
            "version": llama_version(), "flags": "flash_attn auto, kv f16, ubatch 512",
            "system": llama.llama_print_system_info().decode(),
        }  # fmt: skip

    def prefill(self, prompt: list[int]) -> float:
        if len(prompt) > 1024:
            raise Refused("prefill of more than 1024 tokens")
        llama.llama_memory_clear(llama.llama_get_memory(self._short), True)
        started_s = time.perf_counter()
        self._decode(self._short, [(token, i, 0) for i, token in enumerate(prompt)])
        self._best(self._short, [len(prompt) - 1])
        return time.perf_counter() - started_s

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        context, at = self._prepared(prompts, steps)
        tokens = [prompt[-1] for prompt in prompts]
        sequences = range(len(prompts))
        started_s = time.perf_counter()
        for step in range(steps):
            self._decode(context, [(tokens[s], at + step, s) for s in sequences], every=True)
            tokens = self._best(context, list(sequences))
        return time.perf_counter() - started_s

    def greedy(self, prompt: list[int], steps: int) -> list[int]:
        self.prefill(prompt)
        found = self._best(self._short, [len(prompt) - 1])
        while len(found) < steps:
            self._decode(self._short, [(found[-1], len(prompt) + len(found) - 1, 0)])
            found += self._best(self._short, [0])
        return found

    def logits(self, prompt: list[int], is_last_only: bool) -> Any:
        if is_last_only:
            self.prefill(prompt)
            return self._row(self._short, len(prompt) - 1).copy()
        llama.llama_memory_clear(llama.llama_get_memory(self._short), True)
        entries = [(token, i, 0) for i, token in enumerate(prompt)]
        self._decode(self._short, entries, every=True)
        return numpy.stack([self._row(self._short, i).copy() for i in range(len(prompt))])

    def _context(self, tokens: int, sequences: int) -> Any:
        params = llama.llama_context_default_params()
        params.n_ctx = tokens * sequences
        params.n_batch, params.n_ubatch, params.n_seq_max = BATCH, 512, sequences
        params.n_threads = params.n_threads_batch = self._threads
        params.no_perf = True
        context = llama.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"no context of {sequences} x {tokens} tokens")
        return context

    def _prepared(self, prompts: list[list[int]], steps: int) -> tuple[Any, int]:
        """Return a context that holds all prompts but their last tokens, and where to go on."""
        length = len(prompts[0]) - 1
        key = (len(prompts), length, prompts[0][0])
        if key not in self._filled:
            room = -(-(length + steps + 64) // 256) * 256
            context = self._filled[key] = self._context(room, len(prompts))
            for sequence, prompt in enumerate(prompts):
                for start in range(0, length, BATCH):
                    part = prompt[start : min(start + BATCH, length)]
                    entries = [(token, start + i, sequence) for i, token in enumerate(part)]
                    self._decode(context, entries)
        context = self._filled[key]
        memory = llama.llama_get_memory(context)
        for sequence in range(len(prompts)):
            llama.llama_memory_seq_rm(memory, sequence, length, -1)
        return context, length

    def _decode(
        self, context: Any, entries: list[tuple[int, int, int]], *, every: bool = False
    ) -> None:
        """Run (token, position, sequence) entries; logits of the last one, or of every one."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = every or i == len(entries) - 1
        if code := llama.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {code} for {len(entries)} tokens")

    def _row(self, context: Any, index: int) -> Any:
        pointer = llama.llama_get_logits_ith(context, index)
        return numpy.ctypeslib.as_array(pointer, shape=(self._vocab_size,))

    def _best(self, context: Any, indices: list[int]) -> list[int]:
        return [int(self._row(context, index).argmax()) for index in indices]


def llama_version() -> str:
    """Return the version of the package that brought the source."""
    import llama_cpp

    return f"llama-cpp-python {llama_cpp.__version__} ({ctypes.sizeof(ctypes.c_void_p) * 8} bit)"


if __name__ == "__main__":
    serve(LlamaCpp())
