"""Chat templates: Jinja from a checkpoint, run in a sandbox the way `transformers` runs it.

A template is code from a stranger: it sees only plain JSON values and an immutable sandbox. Knows
no tokenizer and no HTTP. Start at `ChatTemplates.render`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mxn.errors import UserError

Message = Mapping[str, Any]

# The names under which clients send the reasoning of earlier turns; templates read the first.
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_MARK = "MXN_CONTINUE_FINAL_MESSAGE "


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; renders as is."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it this way

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    @staticmethod
    def _render(caller: Callable[[], str]) -> str:
        return caller()


class _SafeNamespace(Namespace):
    """Jinja's namespace without underscore names, which could lead into CPython's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_underscore(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace names must not start with '_': {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which would change the prompt.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _SafeNamespace
    return environment.from_string(source)


def _plain(value: Any) -> Any:
    """Return `value` rebuilt from JSON types, so that a template gets no object with methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise UserError(f"a chat template takes JSON values only, got {type(value).__name__}")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = (message[name] for name in _REASONING_NAMES if message.get(name) is not None)
    reasoning = next(found, None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mark_final(messages: list[dict[str, Any]]) -> str:
    """Put the mark after the final message's text; return that text."""
    content = messages[-1].get("content")
    if isinstance(content, str):
        messages[-1]["content"] = content + _CONTINUE_MARK
        return content
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text = part["text"]
            part["text"] = text + _CONTINUE_MARK
            return text
    raise UserError("continue_final_message is set, but the final message has no text to continue")


def _cut_at_mark(rendered: str, final_text: str) -> str:
    mark = _CONTINUE_MARK.strip()
    if mark not in rendered or final_text.strip() not in rendered:
        raise UserError("continue_final_message: the template does not keep the final message")
    at = rendered.rindex(mark)
    is_whole = rendered[at : at + len(_CONTINUE_MARK)] == _CONTINUE_MARK
    # A template may print the message twice; no mark must stay in the prompt.
    head = rendered[:at].replace(_CONTINUE_MARK, "").replace(mark, "")
    # A template that trims messages also trimmed the space after the mark.
    return head if is_whole else head.rstrip()


class ChatTemplates:
    """The named chat templates of one checkpoint; most have exactly one, named `default`."""

    def __init__(self, templates: Mapping[str, str]) -> None:
        self._templates = dict(templates)

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any]) -> ChatTemplates:
        """Read `chat_template.jinja` and its companions, else tokenizer_config.json."""
        found = dict(_template_files(folder))
        if found:
            return cls(found)
        inline = config.get("chat_template")
        if isinstance(inline, str):
            return cls({"default": inline})
        if isinstance(inline, list):
            return cls({item["name"]: item["template"] for item in inline})
        return cls(inline if isinstance(inline, dict) else {})

    def __bool__(self) -> bool:
        return bool(self._templates)

    @property
    def sources(self) -> dict[str, str]:
        """The text of each template by its name."""
        return dict(self._templates)

    def mentions(self, word: str) -> bool:
        """Return whether any template contains `word`, such as a role name."""
        return any(word in source for source in self._templates.values())

    def _choose(self, tools: Sequence[Any] | None) -> str:
        if not self._templates:
            raise UserError(
                "this model has no chat template",
                hint="use /v1/completions, or give the checkpoint a chat_template.jinja",
            )
        if tools is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        names = ", ".join(sorted(self._templates))
        raise UserError(f"this model has several chat templates and none is the default: {names}")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return the prompt text for a conversation.

        Keys of a message whose value is None are left out, as templates expect.
        Raises: UserError for an empty conversation, a missing template and any template error.
        """
        source = self._choose(tools)
        if not messages:
            raise UserError("messages must not be empty")
        if continue_final_message and add_generation_prompt:
            raise UserError(
                "continue_final_message and add_generation_prompt exclude each other",
                hint="set add_generation_prompt to false",
            )
        chat = [
            _with_reasoning(
                {key: _plain(item) for key, item in message.items() if item is not None}
            )
            for message in messages
        ]
        final_text = _mark_final(chat) if continue_final_message else ""
        options = _plain(variables) | {
            "tools": _plain(tools),
            "documents": _plain(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            rendered = _run(source, chat, options)
        except Exception as exc:  # anything a stranger's template does wrong is about this input
            raise UserError(f"the chat template refused these messages: {exc}") from exc
        return _cut_at_mark(rendered, final_text) if continue_final_message else rendered


def _run(source: str, chat: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
    """Render; turns that only call tools get an empty text where the template insists on one.

    Some templates look into the text of every turn, others take any text for an answer, even an
    empty one; so the second way is tried only when the first fails, and the first failure counts.
    """
    template = _compile(source)
    try:
        return template.render(**options, messages=chat)
    except Exception as failure:
        if all("content" in message for message in chat):
            raise
        try:
            return template.render(**options, messages=[{"content": "", **m} for m in chat])
        except Exception:
            raise failure from None


def _template_files(folder: Path) -> Iterator[tuple[str, str]]:
    default = folder / "chat_template.jinja"
    if default.is_file():
        yield "default", default.read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        yield path.stem, path.read_text(encoding="utf-8")
