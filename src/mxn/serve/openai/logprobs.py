"""Log-probabilities in the two shapes of OpenAI: chat and legacy completions.

Values pass through unrounded: a client decides "was it greedy?" by comparing the chosen value with
the largest of the alternatives, so both must be the same float.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mxn.engine.protocol import TokenLogprob
from mxn.models.tokenizer import Tokenizer
from mxn.serve.openai.types import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    TopLogprob,
)

LOWEST = -9999.0  # JSON has no -inf; OpenAI uses this number too


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob]) -> ChatLogprobs:
    """Return `{"content": [{token, logprob, bytes, top_logprobs}]}`."""
    return ChatLogprobs(content=[_chat_entry(tokenizer, entry) for entry in entries])


def _chat_entry(tokenizer: Tokenizer, entry: TokenLogprob) -> ChatTokenLogprob:
    return ChatTokenLogprob(
        token=tokenizer.token_text(entry.token_id),
        logprob=_finite(entry.logprob),
        bytes=list(tokenizer.token_bytes(entry.token_id)),
        top_logprobs=[
            TopLogprob(
                token=tokenizer.token_text(token_id),
                logprob=_finite(entry.logprob if token_id == entry.token_id else logprob),
                bytes=list(tokenizer.token_bytes(token_id)),
            )
            for token_id, logprob in entry.top
        ],
    )


class CompletionLogprobsBuilder:
    """Collects tokens in order and keeps the character offset of the next one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def build(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]
    ) -> CompletionLogprobs:
        """Return the block for the next tokens; an entry of None (the first token) gives nulls."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += _num_characters(self._tokenizer.token_bytes(token_id))
        return CompletionLogprobs(
            tokens=[self._tokenizer.token_text(token_id) for token_id in token_ids],
            token_logprobs=[None if entry is None else _finite(entry.logprob) for entry in entries],
            top_logprobs=[None if entry is None else self._top(entry) for entry in entries],
            text_offset=offsets,
        )

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """Return text → value, best first; of two tokens with one text the better one stays."""
        top: dict[str, float] = {}
        for token_id, logprob in entry.top:
            value = entry.logprob if token_id == entry.token_id else logprob
            top.setdefault(self._tokenizer.token_text(token_id), _finite(value))
        top.setdefault(self._tokenizer.token_text(entry.token_id), _finite(entry.logprob))
        return top


def _num_characters(data: bytes) -> int:
    """Count the characters that begin in `data`: every byte that continues none."""
    return sum(byte & 0xC0 != 0x80 for byte in data)
