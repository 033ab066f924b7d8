"""How model families write tool calls: one row for each, and which row a checkpoint belongs to.

Knows the words only; parsers and grammars are beside it. A new family adds its row to `FORMATS`,
and a mark of its chat template to `_MARKS` where it must be recognized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mxn.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonFormat:
    """Calls whose arguments are JSON.

    `opens` begin calls and `closes` end them, all of them read, and the grammar writes `begin`,
    then calls as `before name middle arguments after` with `between` them, then `end`.
    `is_bare`: an object at the very beginning of an answer is a call, if it names a known function.
    `name_of`: the name stands before the arguments; it is cut out of what precedes the `{`.
    """

    name: str
    opens: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()
    is_bare: bool = False
    separators: bool = False  # `,` or `;` between calls that are in no array
    name_of: Callable[[str], str | None] | None = None
    begin: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    middle: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()  # others that stand inside of calls
    has_short_ids: bool = False  # templates that refuse ids other than nine letters and digits

    def markers(self) -> tuple[str, ...]:
        """Return every mark that may be one token, and must not be dropped as a special one."""
        return (*self.opens, *self.closes, *self.marks)


@dataclass(frozen=True, slots=True, kw_only=True)
class XmlFormat:
    """Calls whose arguments are one element each; values of type string are not quoted.

    A call reads `open head NAME head_end`, then `key KEY value VALUE value_end` for each argument,
    then `close`. The grammar puts `line` after each of them.
    """

    name: str
    opens: tuple[str, ...]
    closes: tuple[str, ...]
    head: str
    head_end: str
    key: str
    value: str
    value_end: str
    foot: str
    line: str = "\n"
    marks: tuple[str, ...] = ()
    has_short_ids: bool = False

    def markers(self) -> tuple[str, ...]:
        return (*self.opens, *self.closes, *self.marks)


ToolFormat = JsonFormat | XmlFormat


def _deepseek_name(header: str) -> str | None:
    """Version 3 writes `function<sep>NAME` and a code fence, version 3.1 `NAME<sep>`."""
    left, _, right = header.partition("<｜tool▁sep｜>")
    lines = right.strip().removesuffix("```json").strip() or left.strip()
    return lines if lines and "\n" not in lines else None


def _mistral_name(header: str) -> str | None:
    """`NAME`, `NAME[ARGS]` or `NAME[CALL_ID]…[ARGS]`."""
    name = header.partition("[")[0].strip()
    return name if name and name[0] != '"' and "\n" not in name else None


def _kimi_name(header: str) -> str | None:
    """`functions.NAME:0<|tool_call_argument_begin|>`."""
    name = header.partition("<|")[0].strip().rpartition(":")[0].removeprefix("functions.")
    return name or None


# What stands around the name and the arguments of an object.
_NAME = ('{"name": "',)
_ARGUMENTS = ('", "arguments": ',)
_PARAMETERS = ('", "parameters": ',)
_CLOSE = ("}",)


FORMATS: dict[str, ToolFormat] = {
    form.name: form
    for form in (
        JsonFormat(
            name="hermes",
            opens=("<tool_call>",),
            closes=("</tool_call>",),
            before=("<tool_call>", '\n{"name": "'),
            middle=('", "arguments": ',),
            after=("}\n", "</tool_call>"),
            between=("\n",),
        ),
        JsonFormat(
            name="llama3",
            opens=("<|python_tag|>",),
            is_bare=True,
            separators=True,
            between=("; ",),
            before=_NAME,
            middle=_PARAMETERS,
            after=_CLOSE,
        ),
        JsonFormat(
            name="mistral",
            opens=("[TOOL_CALLS]",),
            separators=True,
            begin=("[TOOL_CALLS]", "["),
            between=(", ",),
            end=("]",),
            marks=("[ARGS]", "[CALL_ID]"),
            has_short_ids=True,
            name_of=_mistral_name,
            before=_NAME,
            middle=_ARGUMENTS,
            after=_CLOSE,
        ),
        JsonFormat(
            name="mistral-args",
            opens=("[TOOL_CALLS]",),
            before=("[TOOL_CALLS]",),
            middle=("[ARGS]",),
            marks=("[ARGS]", "[CALL_ID]"),
            has_short_ids=True,
            name_of=_mistral_name,
        ),
        JsonFormat(
            name="deepseek-v3",
            opens=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
            closes=("```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
            marks=("<｜tool▁sep｜>",),
            name_of=_deepseek_name,
            begin=("<｜tool▁calls▁begin｜>",),
            before=("<｜tool▁call▁begin｜>", "function", "<｜tool▁sep｜>"),
            middle=("\n```json\n",),
            after=("\n```", "<｜tool▁call▁end｜>"),
            between=("\n",),
            end=("<｜tool▁calls▁end｜>",),
        ),
        JsonFormat(
            name="deepseek-v3.1",
            opens=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
            closes=("```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
            marks=("<｜tool▁sep｜>",),
            name_of=_deepseek_name,
            begin=("<｜tool▁calls▁begin｜>",),
            before=("<｜tool▁call▁begin｜>",),
            middle=("<｜tool▁sep｜>",),
            after=("<｜tool▁call▁end｜>",),
            end=("<｜tool▁calls▁end｜>",),
        ),
        JsonFormat(
            name="kimi-k2",
            opens=("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
            closes=("<|tool_call_end|>", "<|tool_calls_section_end|>"),
            name_of=_kimi_name,
            marks=("<|tool_call_argument_begin|>",),
            begin=("<|tool_calls_section_begin|>",),
            before=("<|tool_call_begin|>", "functions."),
            middle=(":0", "<|tool_call_argument_begin|>"),
            after=("<|tool_call_end|>",),
            end=("<|tool_calls_section_end|>",),
        ),
        JsonFormat(
            name="granite",
            opens=("<|tool_call|>", "<tool_call>"),
            closes=("<|/tool_call|>", "</tool_call>"),
            begin=("<|tool_call|>", "["),
            between=(", ",),
            end=("]",),
            before=_NAME,
            middle=_ARGUMENTS,
            after=_CLOSE,
        ),
        JsonFormat(
            name="phi4",
            opens=("<|tool_call|>", "functools"),
            closes=("<|/tool_call|>",),
            begin=("<|tool_call|>", "["),
            between=(", ",),
            end=("]", "<|/tool_call|>"),
            before=_NAME,
            middle=_ARGUMENTS,
            after=_CLOSE,
        ),
        JsonFormat(
            name="internlm",
            opens=("<|action_start|>", "<|plugin|>"),
            closes=("<|action_end|>",),
            before=("<|action_start|>", "<|plugin|>", '{"name": "'),
            middle=('", "parameters": ',),
            after=("}", "<|action_end|>"),
            between=("\n",),
        ),
        JsonFormat(
            name="json",
            is_bare=True,
            separators=True,
            between=("\n",),
            before=_NAME,
            middle=_ARGUMENTS,
            after=_CLOSE,
        ),
        XmlFormat(
            name="qwen3-coder",
            opens=("<tool_call>",),
            closes=("</tool_call>",),
            head="<function=",
            head_end=">",
            key="<parameter=",
            value=">",
            value_end="</parameter>",
            foot="</function>",
        ),
        XmlFormat(
            name="glm-4.5",
            opens=("<tool_call>",),
            closes=("</tool_call>",),
            head="",
            head_end="\n",
            key="<arg_key>",
            value="</arg_key>\n<arg_value>",
            value_end="</arg_value>",
            foot="",
            marks=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        ),
    )
}

# The first row whose words all stand in a checkpoint's chat template decides.
_MARKS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<tool_call>", "<function="), "qwen3-coder"),
    (("<tool_call>", "<arg_key>"), "glm-4.5"),
    (("[TOOL_CALLS]", "[ARGS]"), "mistral-args"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<｜tool▁call▁begin｜>", "```json"), "deepseek-v3"),
    (("<｜tool▁call▁begin｜>",), "deepseek-v3.1"),
    (("<|tool_call_begin|>",), "kimi-k2"),
    (("<|action_start|>", "<|plugin|>"), "internlm"),
    (("<|/tool_call|>",), "phi4"),
    (("functools",), "phi4"),
    (("<|tool_call|>",), "granite"),
    (("<tool_call>", "</tool_call>"), "hermes"),
    (("<tool_call>",), "granite"),
    (("<|python_tag|>",), "llama3"),
    (('"parameters"', "ipython"), "llama3"),
)
_FAMILIES = {"mistral": "mistral", "llama": "llama3", "phi3": "phi4", "granite": "granite"}


def check_format_name(name: str) -> None:
    """Raises: ConfigError for a format that does not exist."""
    if name not in FORMATS:
        raise ConfigError(f"unknown tool parser {name!r}; one of {', '.join(FORMATS)}")


def tool_format(name: str | None, mentions: Callable[[str], bool], family: str) -> ToolFormat:
    """Return a format by `name`, else by what the chat template mentions, else by family.

    Raises: ConfigError for a name that does not exist.
    """
    if name is not None:
        check_format_name(name)
        return FORMATS[name]
    if not mentions("tools"):
        return FORMATS["hermes"]  # what the general instruction asks for
    for words, found in _MARKS:
        if all(mentions(word) for word in words):
            return FORMATS[found]
    return FORMATS[_FAMILIES.get(family, "json")]
