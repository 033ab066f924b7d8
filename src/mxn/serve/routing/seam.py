"""One answer across several replicas: what was made and sent, and how the next one goes on.

Pure. A new replica gets the token ids so far as `resume_ids` and says the text of all of them
again; the part that had left already is cut, so the client sees neither a gap nor a repetition.
"""

from __future__ import annotations

import msgspec

from mxn.engine.protocol import Delta, Generate
from mxn.errors import InternalError


class Seam:
    """State of one request. Call `take` for each delta and `move` before each further replica."""

    __slots__ = (
        "_cached_tokens", "_cut", "_device_s", "_has_begun", "_has_prompt_logprobs", "_is_fresh",
        "_prompt_tokens", "_text", "_token_ids", "num_moves", "request",
    )  # fmt: skip

    def __init__(self, request: Generate) -> None:
        self.request = request
        self.num_moves = 0
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._cut: str | None = None  # text the present replica says again; None: nothing to cut
        self._is_fresh = False  # the present replica took over and has not said anything
        self._has_begun = False
        self._has_prompt_logprobs = False
        self._prompt_tokens = self._cached_tokens = 0
        self._device_s = 0.0

    @property
    def has_begun(self) -> bool:
        """Whether anything has been handed on."""
        return self._has_begun

    @property
    def num_tokens(self) -> int:
        """Tokens made here, without those the request came with."""
        return len(self._token_ids)

    def move(self) -> Generate:
        """Return the request for another replica, under an id of its own."""
        self.num_moves += 1
        self._cut = "".join(self._text)
        self._is_fresh = True
        return msgspec.structs.replace(
            self.request,
            request_id=f"{self.request.request_id}~{self.num_moves}",
            resume_ids=[*self.request.resume_ids, *self._token_ids],
        )

    def take(self, delta: Delta) -> Delta | None:
        """Return what the client gets of a delta; None: nothing new is in it.

        Raises: InternalError when the new replica's text does not go on from the old one's.
        """
        if not self.num_moves:
            self._note(delta)
            return delta
        if self._is_fresh:
            self._check_resumed(delta)
        text = self._trim(delta)
        joined = msgspec.structs.replace(
            delta,
            request_id=self.request.request_id,
            text=text,
            prompt_logprobs=None if self._has_prompt_logprobs else delta.prompt_logprobs,
            prompt_tokens=self._prompt_tokens or delta.prompt_tokens,
            cached_tokens=self._cached_tokens if self._prompt_tokens else delta.cached_tokens,
            device_s=delta.device_s + self._device_s if delta.finish_reason else delta.device_s,
        )
        self._note(joined)
        is_empty = not (text or delta.token_ids or delta.finish_reason or joined.prompt_logprobs)
        return None if is_empty else joined

    def _note(self, delta: Delta) -> None:
        self._has_begun = True
        if delta.token_ids:
            self._token_ids += delta.token_ids
        if delta.text:
            self._text.append(delta.text)
        if delta.prompt_tokens and not self._prompt_tokens:
            self._prompt_tokens, self._cached_tokens = delta.prompt_tokens, delta.cached_tokens
        if delta.prompt_logprobs is not None:
            self._has_prompt_logprobs = True
        if delta.finish_reason is None:
            self._device_s += delta.device_s

    def _check_resumed(self, delta: Delta) -> None:
        """Notice a replica that began anew: its ids would be counted and billed twice."""
        self._is_fresh = False
        num_resumed = len(self.request.resume_ids) + len(self._token_ids)
        if delta.completion_tokens < num_resumed:
            raise InternalError(
                f"a replica that took over counts {delta.completion_tokens} tokens "
                f"where {num_resumed} had been made: it cannot resume"
            )

    def _trim(self, delta: Delta) -> str:
        if not self._cut:
            return delta.text
        both = min(len(self._cut), len(delta.text))
        if self._cut[:both] != delta.text[:both]:
            said, sent = delta.text[:both], self._cut[:both]
            at = next(i for i in range(both) if said[i] != sent[i])
            raise InternalError(  # offsets only: errors are logged, and answers are not
                "a replica that took over said something else than what had been sent, "
                f"{len(self._cut) - at} characters before its end"
            )
        if delta.finish_reason is not None and len(self._cut) > both:
            raise InternalError(
                f"a replica that took over ended {len(self._cut) - both} characters before "
                "what had been sent"
            )
        self._cut = self._cut[both:] or None
        return delta.text[both:]
