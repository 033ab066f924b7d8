"""What a request asks of its tools, checked, and the grammar of a whole answer. Pure.

Start at `plan_tools`; `constraint` joins tools, form and thought into the grammar of a run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mxn.engine.protocol import Grammar
from mxn.serve.chat import lark
from mxn.serve.chat.reasoning import Begins, Tags
from mxn.serve.chat.tools.formats import ToolFormat
from mxn.serve.chat.tools.grammar import Signature, call_rules, free_rules
from mxn.serve.openai.errors import ApiError
from mxn.serve.openai.types import (
    ChatRequest,
    ChatTool,
    FunctionDefinition,
    ToolChoice,
    ToolName,
)

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.:/-]{1,128}")
_NO_ARGUMENTS: dict[str, Any] = {
    "type": "object", "properties": {}, "additionalProperties": False,
}  # fmt: skip
_ANY_OBJECT: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPlan:
    """`shown` go into the prompt, `callable` may be called now."""

    shown: tuple[FunctionDefinition, ...] = ()
    callable: tuple[FunctionDefinition, ...] = ()
    must_call: bool = False
    is_single: bool = False  # at most one call in an answer

    @property
    def parses(self) -> bool:
        return bool(self.callable)

    def definitions(self) -> list[dict[str, Any]] | None:
        """Return the tools as templates take them, or None."""
        return [_definition(function) for function in self.shown] or None

    def schemas(self) -> dict[str, dict[str, Any]]:
        return {function.name: function.parameters or {} for function in self.callable}


def _definition(function: FunctionDefinition) -> dict[str, Any]:
    out: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        out["description"] = function.description
    out["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": out}


def may_constrain(body: ChatRequest) -> bool:
    """Return whether a request can need a grammar, which takes time to check."""
    forms = (
        body.response_format, body.structured_outputs, body.guided_json, body.guided_regex,
        body.guided_choice, body.guided_grammar,
    )  # fmt: skip
    return bool(body.tools or body.functions) or any(form is not None for form in forms)


def plan_tools(body: ChatRequest) -> ToolPlan:
    """Return what may and must be called. Raises: ApiError with `param`."""
    if body.tools:
        param, functions = "tools", _functions(body.tools)
        wanted, choice_param = body.tool_choice, "tool_choice"
    else:
        param, functions = "functions", list(body.functions or ())
        wanted, choice_param = _legacy_choice(body), "function_call"
        if wanted is None:  # a choice without tools may still ask for the impossible
            wanted, choice_param = body.tool_choice, "tool_choice"
    _check(functions, param)
    allowed, must_call = _chosen(wanted, functions, choice_param)
    if not allowed:
        return ToolPlan()
    is_named = isinstance(wanted, ToolChoice) and wanted.allowed_tools is None
    return ToolPlan(
        shown=tuple(functions),
        callable=tuple(allowed),
        must_call=must_call,
        is_single=body.parallel_tool_calls is False or param == "functions" or is_named,
    )


def _functions(tools: Sequence[ChatTool]) -> list[FunctionDefinition]:
    functions = []
    for at, tool in enumerate(tools):
        if tool.type != "function":
            raise ApiError(
                f"tools[{at}] has type {tool.type!r}; only functions are offered.",
                param=f"tools[{at}].type",
            )
        if tool.function is None:
            raise ApiError(f"tools[{at}].function is required.", param=f"tools[{at}].function")
        functions.append(tool.function)
    return functions


def _check(functions: Sequence[FunctionDefinition], param: str) -> None:
    if len(functions) > MAX_TOOLS:
        raise ApiError(f"At most {MAX_TOOLS} tools, got {len(functions)}.", param=param)
    seen: set[str] = set()
    for at, function in enumerate(functions):
        place = f"{param}[{at}].function" if param == "tools" else f"{param}[{at}]"
        if not _NAME.fullmatch(function.name):
            raise ApiError(
                f"{place}.name has 1 to 128 of the characters a-z, A-Z, 0-9 and _.:/-, "
                f"got {function.name[:140]!r}.",
                param=f"{place}.name",
            )
        if function.name in seen:
            raise ApiError(f"Two tools are named {function.name!r}.", param=f"{place}.name")
        seen.add(function.name)
        kind = (function.parameters or {}).get("type", "object")
        if kind != "object":
            raise ApiError(
                f"{place}.parameters is the schema of an object, got type {kind!r}.",
                param=f"{place}.parameters",
            )
        if function.strict and (wrong := _schema_fault(_parameters(function))):
            raise ApiError(f"{place}.parameters: {wrong}", param=f"{place}.parameters")


def _legacy_choice(body: ChatRequest) -> str | ToolChoice | None:
    choice = body.function_call
    if choice is None or isinstance(choice, str):
        return choice
    return ToolChoice(function=choice)


def _chosen(
    wanted: str | ToolChoice | None, functions: list[FunctionDefinition], param: str
) -> tuple[list[FunctionDefinition], bool]:
    """Return (functions that may be called, whether one must)."""
    if wanted is None or wanted in ("auto", "none"):
        return ([] if wanted == "none" else functions), False
    if not functions:
        raise ApiError(f"{param} needs tools.", param=param)
    if wanted == "required":
        return functions, True
    if isinstance(wanted, str):
        raise ApiError(
            f"{param} is none, auto, required or a function, got {wanted!r}.", param=param
        )
    if wanted.allowed_tools is not None:
        names = [_name(tool, param) for tool in wanted.allowed_tools.tools]
        allowed = [_find(name, functions, param) for name in dict.fromkeys(names)]
        return allowed, wanted.allowed_tools.mode == "required"
    return [_find(_name(wanted, param), functions, param)], True


def _name(tool: ToolChoice | ToolName, param: str) -> str:
    if tool.type != "function" or tool.function is None:
        raise ApiError(
            f"{param} names a function as {{'type': 'function', 'function': {{'name': …}}}}, "
            f"got type {tool.type!r}.",
            param=param,
        )
    return tool.function.name


def _find(name: str, functions: list[FunctionDefinition], param: str) -> FunctionDefinition:
    for function in functions:
        if function.name == name:
            return function
    known = ", ".join(repr(function.name) for function in functions[:20])
    raise ApiError(f"{param} names {name!r}, which is no tool. Tools: {known}.", param=param)


def _parameters(function: FunctionDefinition) -> dict[str, Any]:
    if function.parameters is None:
        return _NO_ARGUMENTS
    return {"type": "object", **function.parameters}


def _signature(function: FunctionDefinition) -> Signature:
    schema = _parameters(function)
    # A schema is a promise only with `strict`: one that cannot be enforced then means any object.
    if not function.strict and _schema_fault(schema):
        schema = _ANY_OBJECT
    return Signature(name=function.name, schema=schema)


def _schema_fault(schema: dict[str, Any]) -> str | None:
    return lark.fault(Grammar(kind="json_schema", source=lark.json_of(schema)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """Whether and how a thought stands before what a grammar says."""

    tags: Tags | None
    begins: Begins


def constraint(
    plan: ToolPlan, form: Grammar | None, tools: ToolFormat, thought: Thought,
    token_of: lark.TokenOf,
) -> Grammar | None:  # fmt: skip
    """Return the grammar of the whole answer, or None for a free one.

    A call that must come, or may come beside a form, and arguments of strict tools are in it; a
    thought before them stays free.
    """
    rules: list[str]
    if plan.must_call or (plan.parses and form is not None):
        signatures = [_signature(function) for function in plan.callable]
        rules = call_rules(tools, signatures, token_of, is_single=plan.is_single)
        body = "calls"
        if not plan.must_call and form is not None:
            rules.append(f"answer: {lark.expression(form)}")
            body = "(calls | answer)"
    elif any(function.strict for function in plan.callable):
        signatures = [_signature(function) for function in plan.callable]
        rules = free_rules(tools, signatures, token_of, is_single=plan.is_single)
        body = "free"
    elif form is None:
        return None
    elif thought.begins == "never":
        return form
    else:
        rules, body = [f"answer: {lark.expression(form)}"], "answer"
    head, before = _before(thought, token_of)
    source = "\n".join([f"start: {head}{body}", *before, *rules])
    return Grammar(kind="lark", source=source)


def _before(thought: Thought, token_of: lark.TokenOf) -> tuple[str, list[str]]:
    """Return the beginning of `start` and the rules it needs."""
    if thought.begins == "never" or thought.tags is None:
        return "", []
    rules = [*lark.until("thought", thought.tags.closes, token_of), r"gap: /\n{0,2}/"]
    if thought.begins == "open":
        return "thought gap ", rules
    opens = lark.mark(thought.tags.opens, token_of)
    return f"({opens} thought gap)? ", rules
