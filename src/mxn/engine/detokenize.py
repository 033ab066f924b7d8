"""Token ids to text while they come, cut at stop strings.

What comes out never ends in half a character or in what may become a stop string, and joined it is
the text of decoding all tokens at once. Knows no sampling and no tokenizer library. Start at
`StreamDetokenizer`.

Two things decide how: a token's text depends on its neighbours (leading spaces, characters spread
over tokens), so tokens are decoded within a short window of the tokens before them; and what was
given out cannot be taken back, so text waits until no later token can change it.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, runtime_checkable

from mxn.errors import InternalError, UserError

_BROKEN = "\ufffd"  # what decoders put in place of bytes that are no character (yet)
_UTF8 = getincrementaldecoder("utf-8")
_WINDOW_MAX = 24  # tokens decoded together; then the window is cut to ...
_WINDOW_KEPT = 8  # ... these. Both measured, see docs/design/0004
_UNSURE_CHARS = 4  # at the start of a window: a stripped space or up to 3 bytes of a cut character


class TokenDecoder(Protocol):
    """What is needed of a tokenizer: text that only grows at its end as tokens are added.

    The end itself may change while it is U+FFFD, the sign for an incomplete character.
    """

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...


@runtime_checkable
class ByteDecoder(Protocol):
    """A decoder that may know its tokens as bytes, which joined are the text in UTF-8."""

    def byte_pieces(self, skip_special_tokens: bool) -> Mapping[int, bytes] | None:
        """Return the bytes of every id, or None where the text is more than these."""
        ...


def byte_fallback_ids(vocab: Mapping[str, int]) -> frozenset[int]:
    """Return the ids of ``<0x00>`` .. ``<0xFF>``, or an empty set if not all 256 exist.

    A run of such tokens is decoded as a whole: one bad byte at its end turns good characters before
    it into U+FFFD. So their text must wait for the end of the run.
    """
    ids = frozenset(vocab[token] for byte in range(256) if (token := f"<0x{byte:02X}>") in vocab)
    return ids if len(ids) == 256 else frozenset()


class StopMatcher:
    """Finds the stop string that ends first (of several, the longest) in text that comes in pieces.

    One Knuth-Morris-Pratt automaton for each string: a character is looked at once, and the state
    says how much text may still become a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise UserError("a stop string is empty", hint="leave it out")
        self.stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._fallbacks = [_kmp_fallbacks(stop) for stop in self.stops]
        self._states = [0] * len(self.stops)
        self._held = ""  # may be the beginning of a stop string

    def push(self, text: str, *, is_armed: bool = True) -> tuple[str, str | None]:
        """Return the text that is safe to show, up to the stop string, and that string if found.

        Not armed: stop strings that end within `text` do not count.
        """
        if not self.stops:
            return text, None
        held = self._held + text
        states = self._states
        for offset, char in enumerate(text, start=len(self._held) + 1):
            for index, stop in enumerate(self.stops):
                state, fallbacks = states[index], self._fallbacks[index]
                while state and (state == len(stop) or stop[state] != char):
                    state = fallbacks[state]
                state += stop[state] == char
                states[index] = state
            if is_armed:
                for stop, state in zip(self.stops, states, strict=True):
                    if state == len(stop):
                        return held[: offset - state], stop
        # A whole stop string that did not count may still go on as the beginning of a longer one.
        num_held = max(
            fallbacks[state] if state == len(stop) else state
            for stop, state, fallbacks in zip(self.stops, states, self._fallbacks, strict=True)
        )
        safe = len(held) - num_held
        self._held = held[safe:]
        return held[:safe], None

    def flush(self) -> str:
        """Return what was held back: no text follows."""
        held, self._held = self._held, ""
        return held


def _kmp_fallbacks(pattern: str) -> list[int]:
    """Return for each length n the longest proper beginning of ``pattern[:n]`` that ends it."""
    fallbacks = [0, 0]
    state = 0
    for char in pattern[1:]:
        while state and pattern[state] != char:
            state = fallbacks[state]
        state += pattern[state] == char
        fallbacks.append(state)
    return fallbacks


class _TextWindow:
    """Turns tokens into text that no later token can change. O(1) per token."""

    def __init__(
        self,
        decoder: TokenDecoder,
        *,
        skip_special_tokens: bool,
        context_ids: Sequence[int],
        byte_ids: Collection[int],
    ) -> None:
        self._decoder = decoder
        self._skip = skip_special_tokens
        self._byte_ids = byte_ids
        self._ids = list(context_ids)  # the window
        self._text = self._decode() if self._ids else ""
        self._context = self._text  # no output, except where output completes its last bytes
        self._shown = len(self._text)  # characters of _text that are given out
        self._in_byte_run = False

    def push(self, token_id: int) -> str:
        ids = self._ids
        ids.append(token_id)
        if token_id in self._byte_ids:
            self._in_byte_run = True
            return ""
        text = self._decode()
        if self._in_byte_run and text == self._decode_all_but_last():
            ids.pop()  # a skipped token does not end the run
            return ""
        self._in_byte_run = False
        old = self._text
        if text == old and old and old[-1] != _BROKEN:
            ids.pop()  # a token without text, such as a skipped one, would crowd the window
            return ""
        self._text = text
        delta = self._show(len(text) - (text[-1:] == _BROKEN))
        if len(ids) > _WINDOW_MAX:
            self._shorten()
        return delta

    def flush(self) -> str:
        """Return the rest, with U+FFFD for an incomplete character."""
        self._text = self._decode()
        return self._show(len(self._text))

    def _decode(self) -> str:
        return self._decoder.decode(self._ids, self._skip)

    def _decode_all_but_last(self) -> str:
        return self._decoder.decode(self._ids[:-1], self._skip)

    def _show(self, end: int) -> str:
        if self._context:
            self._shown = _common_length(self._context, self._text)
        if end <= self._shown:
            return ""
        delta = self._text[self._shown : end]
        self._shown = end
        self._context = ""
        return delta

    def _shorten(self) -> None:
        """Drop the oldest tokens if the text of the rest can be laid over the text of all."""
        # Half of a window that grew: tokens of single bytes give too few characters to compare.
        rest = self._ids[-max(_WINDOW_KEPT, len(self._ids) // 2) :]
        text = self._decoder.decode(rest, self._skip)
        sure = text[_UNSURE_CHARS:]
        shown = len(text) - (len(self._text) - self._shown)
        if sure and self._text.endswith(sure) and shown > 0:
            self._ids, self._text, self._shown = rest, text, shown
            self._context = ""


class _ByteText:
    """Turns tokens that are plain bytes into text, character by character; see `_TextWindow`."""

    def __init__(self, pieces: Mapping[int, bytes], context_ids: Sequence[int]) -> None:
        self._pieces = pieces
        self._decoder = _UTF8("replace")
        self._decoder.decode(b"".join([pieces[token_id] for token_id in context_ids]))
        # The context ends within a character: what becomes of it is output only if it is whole.
        self._is_inside = bool(self._decoder.getstate()[0])

    def push(self, token_id: int) -> str:
        text = self._decoder.decode(self._pieces[token_id])
        return self._without_context(text) if self._is_inside else text

    def flush(self) -> str:
        text = self._decoder.decode(b"", True)
        return self._without_context(text) if self._is_inside else text

    def _without_context(self, text: str) -> str:
        self._is_inside = not text
        return text.removeprefix(_BROKEN)


def _text_of(
    decoder: TokenDecoder, skip: bool, context_ids: Sequence[int], byte_ids: Collection[int]
) -> _ByteText | _TextWindow:
    if isinstance(decoder, ByteDecoder):
        pieces = decoder.byte_pieces(skip)
        if pieces is not None:
            return _ByteText(pieces, context_ids)
    return _TextWindow(
        decoder, skip_special_tokens=skip, context_ids=context_ids, byte_ids=byte_ids
    )


class StreamDetokenizer:
    """The text of one sequence, in deltas.

    `prompt_ids` is the end of the prompt (all of it is fine): the output continues its text, so
    that a leading space is neither lost nor doubled. `stop` ends the text; the string itself
    belongs to the text only with `include_stop_str`. A stop string that is complete before token
    number `min_tokens` does not count. `byte_ids` comes from `byte_fallback_ids`.
    """

    def __init__(
        self,
        decoder: TokenDecoder,
        *,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str: bool = False,
        min_tokens: int = 0,
        byte_ids: Collection[int] = frozenset(),
    ) -> None:
        context_ids = _context_tail(prompt_ids, byte_ids)
        self._window = _text_of(decoder, skip_special_tokens, context_ids, byte_ids)
        self._matcher = StopMatcher(stop)
        self._include_stop_str = include_stop_str
        self._min_tokens = min_tokens
        self._is_done = False
        self.num_tokens = 0  # pushed; those behind a stop string within one `push` do not count
        self.stop_hit: str | None = None

    def push(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """Return (new text, stop string that was found or None). After a stop no text follows.

        Raises: InternalError after `finish`.
        """
        if self._is_done:
            raise InternalError("tokens were pushed after the text had been finished")
        deltas = []
        for token_id in token_ids:
            if self.stop_hit is not None:
                break
            self.num_tokens += 1
            deltas.append(self._show(self._window.push(token_id)))
        return "".join(deltas), self.stop_hit

    def finish(self) -> tuple[str, str | None]:
        """Return the text that was held back, and a stop string if one came to light in it."""
        if self._is_done or self.stop_hit is not None:
            self._is_done = True
            return "", self.stop_hit
        self._is_done = True
        text = self._show(self._window.flush())
        if self.stop_hit is None:
            text += self._matcher.flush()
        return text, self.stop_hit

    def _show(self, text: str) -> str:
        if not text:
            return ""
        is_armed = self.num_tokens >= self._min_tokens
        shown, self.stop_hit = self._matcher.push(text, is_armed=is_armed)
        if self.stop_hit is not None and self._include_stop_str:
            shown += self.stop_hit
        return shown


def _common_length(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def _context_tail(prompt_ids: Sequence[int], byte_ids: Collection[int]) -> Sequence[int]:
    """Return the last tokens of a prompt, not beginning within a run of byte tokens."""
    start = max(0, len(prompt_ids) - _WINDOW_KEPT)
    while start > 0 and prompt_ids[start] in byte_ids:
        start -= 1
    return prompt_ids[start:]
