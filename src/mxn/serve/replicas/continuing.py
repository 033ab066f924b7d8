"""Whether a half-finished answer of a foreign server may be continued by another, and with what.

The second server gets what was said as the assistant's last message and goes on. It knows nothing
of the first one's state, so a request whose fields act on the answer as a whole must not cross the
seam: its client would get a wrong answer without being told. Knows bodies of OpenAI's chat route
and the extensions of common servers; sends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from mxn.serve.replicas.sse import Choice

# Why each field stops a continuation, and the values of it that have no effect.
_CROSSING: dict[str, tuple[tuple[Any, ...], str]] = {
    # A grammar starts anew on the second server: `{"a": 1` would go on as `{"b": 2}`.
    **dict.fromkeys(
        ("structured_outputs", "grammar", "json_schema", "ebnf", "regex", "structural_tag"),
        ((None, "", {}), "the form it is held to starts anew"),
    ),
    # Counts of what was said, which the second server takes for a part of the prompt. Some count
    # the prompt for `repetition_penalty` too, not all.
    "frequency_penalty": ((None, 0), "its penalties are counted anew"),
    "presence_penalty": ((None, 0), "its penalties are counted anew"),
    "repetition_penalty": ((None, 1), "its penalties are counted anew"),
    "repeat_penalty": ((None, 1), "its penalties are counted anew"),
    "dry_multiplier": ((None, 0), "its penalties are counted anew"),
    "mirostat": ((None, 0), "its sampler has a state"),
    # Tokens are known as events only, so what is left of these numbers is not known.
    "min_tokens": ((None, 0), "its shortest length is counted anew"),
    "n_predict": ((None, -1), "its length is counted anew"),
    # The second server cuts the text into tokens of its own, at the seam other ones.
    "logprobs": ((None, False), "its tokens change at the seam"),
    "use_beam_search": ((None, False), "its beams are lost"),
    # Both already say how the last message is meant, and ours would come after it.
    "echo": ((None, False), "its last message would be said again"),
    "continue_final_message": ((None, False), "it goes on with a message of its own"),
}
# `logit_bias`, `temperature`, `top_p`, `top_k`, `min_p` and `stop_token_ids` act on one token at a
# time; `seed` only makes another sample of the rest. None of them crosses the seam.


def obstacle(fields: Mapping[str, msgspec.Raw], said: str) -> str | None:
    """Return why a request may not be continued after `said`; None: it may."""
    for name, raw in fields.items():
        if name in _CROSSING:
            harmless, why = _CROSSING[name]
            if _value(raw) not in harmless:
                return f"{name}: {why}"
        elif name.startswith("guided_") and _value(raw) is not None:
            return f"{name}: the form it is held to starts anew"
    if _is_form(_value(fields.get("response_format"))):
        return "response_format: the form it is held to starts anew"
    for name in ("tool_choice", "function_call"):
        if _value(fields.get(name)) not in (None, "auto", "none"):
            return f"{name}: a forced call starts anew"
    if _ends_in_a_stop(said, _value(fields.get("stop"))):
        return "stop: a stop string may begin in what was sent"
    if _last_role(fields) == "assistant":
        return "messages: it goes on with a message of its own"
    return None


def text_of(choices: Sequence[Choice]) -> str | None:
    """Return the text of an answer so far; None when it holds more than text."""
    parts: list[str] = []
    for choice in choices:
        for name, raw in delta_of(choice).items():
            value = _value(raw)
            if name == "content" and (value is None or isinstance(value, str)):
                parts.append(value or "")
            elif name != "role" and value:
                return None
    return "".join(parts)


def delta_of(choice: Choice) -> dict[str, msgspec.Raw]:
    """Return the fields of a delta; `SseReader` lets none pass that is no object."""
    return msgspec.json.decode(choice.delta, type=dict[str, msgspec.Raw] | None) or {}


def is_opening(choice: Choice) -> bool:
    """Whether a delta says nothing but the role, as the first one does."""
    if choice.text is not None:
        return not choice.text
    return not any(_says(raw) for name, raw in delta_of(choice).items() if name != "role")


_EMPTY = frozenset({b"null", b'""', b"[]", b"{}", b"false", b"0"})


def _says(raw: msgspec.Raw) -> bool:
    return bytes(raw) not in _EMPTY


def _value(raw: msgspec.Raw | None) -> Any:
    """Return a field's value; one that is too deep to read is an object of some kind."""
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ...


def _is_form(value: Any) -> bool:
    kind = value.get("type") if isinstance(value, dict) else value
    return value is not None and kind != "text"


def _ends_in_a_stop(said: str, stop: Any) -> bool:
    """Whether a stop string could begin in `said` and end behind it, where nobody would find it.

    Servers hold back what may become one, so this is rare.
    """
    words = [stop] if isinstance(stop, str) else stop
    if words is None:
        return False
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return True
    return any(said.endswith(word[:size]) for word in words for size in range(1, len(word)))


def _last_role(fields: Mapping[str, msgspec.Raw]) -> str | None:
    messages = _value(fields.get("messages"))
    last = messages[-1] if isinstance(messages, list) and messages else None
    return last.get("role") if isinstance(last, dict) else None
