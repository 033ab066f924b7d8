"""Plain `transformers` generate as a peer, in the two ways it can serve several requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mxn.bench.workload import Request


class TransformersPeer:
    """`AutoModelForCausalLM.generate`, greedy, with its default cache and SDPA attention."""

    def __init__(self, directory: Path, dtype: str, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype)
        ).to(device)
        self._model.eval()
        self._device = device

    def one_by_one(self, requests: tuple[Request, ...]) -> list[list[int]]:
        """Answer the requests one after another, as a server without batching does."""
        return [self._generate([request])[0] for request in requests]

    def static_batch(self, requests: tuple[Request, ...]) -> list[list[int]]:
        """Answer all in one left-padded batch that runs until the longest answer is complete."""
        return self._generate(list(requests))

    def logits(self, prompt_ids: tuple[int, ...]) -> Any:
        """Return the logits behind a prompt: [V], float32."""
        with self._torch.inference_mode():
            ids = self._torch.tensor([list(prompt_ids)], device=self._device)
            return self._model(ids, logits_to_keep=1).logits[0, -1].float().cpu()

    def _generate(self, requests: list[Request]) -> list[list[int]]:
        torch = self._torch
        width = max(len(request.prompt_ids) for request in requests)
        ids = [[0] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests]
        mask = [[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests]
        longest = max(request.new_tokens for request in requests)
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=torch.tensor(ids, device=self._device),
                attention_mask=torch.tensor(mask, device=self._device),
                max_new_tokens=longest, min_new_tokens=longest, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        rows = out[:, width:].tolist()
        return [row[: r.new_tokens] for row, r in zip(rows, requests, strict=True)]
