"""Calls that models write with a tag around each argument: GLM, Hy3, and Qwen since Qwen3-Coder.

A value is there as it is, without quotation marks if it is a text; what the function asks for tells what it means.
"""

import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mpillama.openai.object_calls import END_TOOL_CALL, TOOL_CALL
from mpillama.openai.tool_calls import ToolFormat
from mpillama.openai.tool_grammars import (
    Function,
    TokenId,
    call_rules,
    marker_rule,
    more_rules,
    properties_of,
    schema_rule,
    within,
)
from mpillama.openai.tool_json import strict_json
from mpillama.openai.tool_readers import (
    MOST_NAME,
    Call,
    NoCall,
    Reader,
    expect,
    literal,
    plain_name,
    skip_space,
    text_before,
    word,
)
from mpillama.text.constraint import text_rule, token_rule

NAMES_OF: Mapping[type, set[str]] = {
    bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, dict: {"object"}, list: {"array"},
    type(None): {"null"},
}  # fmt: skip
"""What JSON's schemas call the values of Python."""


@dataclass(frozen=True)
class Tags:
    """What stands around a block of calls, each call, its name, and names and values of arguments."""

    block: tuple[str, str]
    call: tuple[str, str]
    name_end: str
    key: tuple[str, str]
    value: tuple[str, str]


AS_PYTHON = {"True": "true", "False": "false", "None": "null"}
"""Values as templates write them that take Python's words for them."""


@dataclass(frozen=True)
class TaggedCall(Call):
    """A call whose values wait for the types that the function asks for."""

    values: tuple[tuple[str, str], ...] = ()

    def typed(self, parameters: Mapping[str, Any] | None) -> str:
        """The arguments as a JSON object, by the schema of the function's parameters."""
        known = properties_of(parameters or {})
        members = (
            f"{json.dumps(key, ensure_ascii=False)}: {_as_json(text, known.get(key))}" for key, text in self.values
        )
        return "{" + ", ".join(members) + "}"


def _as_json(text: str, schema: Any) -> str:
    """A value in JSON: a text stays one if nothing else is asked for, or if it is no JSON."""
    types = _types(schema)
    if types & {"boolean", "null"} and "string" not in types:
        text = AS_PYTHON.get(text, text)
    if types != {"string"}:
        try:
            found = strict_json(text)
        except (ValueError, RecursionError):
            pass
        else:
            if "string" not in types or (not isinstance(found, str) and NAMES_OF[type(found)] & types):
                return text.strip()
    return json.dumps(text, ensure_ascii=False)


def _types(schema: Any) -> set[str]:
    """The JSON types that a schema names, as far as it does so plainly."""
    if not isinstance(schema, Mapping):
        return set()
    given = schema.get("type")
    found = {name for name in ([given] if isinstance(given, str) else _list(given)) if isinstance(name, str)}
    choices = _list(schema.get("enum"))
    if not found and choices and all(isinstance(choice, str) for choice in choices):
        return {"string"}
    for part in (*_list(schema.get("anyOf")), *_list(schema.get("oneOf"))):
        found |= _types(part)
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


FREE_TEXT = r"(<+[^<\/]|[^<])*"
"""A text in which nothing ends a tag."""


def each_argument(function: Function, rule: Callable[[str, Mapping[str, Any]], str]) -> Iterator[str]:
    """`rule` of the name and schema of each argument, in their order; those that are not required may be left out."""
    outer = function.parameters
    shared = {key: outer[key] for key in ("$defs", "definitions") if key in outer}
    schema_rule(function, outer)  # refuses what is no schema
    for name, schema in properties_of(outer).items():
        found = rule(name, within(schema, shared))
        yield found if name in _list(outer.get("required")) else f"({found})?"


def value_rule(function: Function, schema: Mapping[str, Any]) -> str:
    """A value that is not just any text: a choice of texts without quotation marks, or JSON."""
    return unquoted(schema) or schema_rule(function, schema)


def _argument_rules(
    function: Function, argument: Callable[[str, str], str], end_id: int | None, end: str
) -> Iterator[str]:  # fmt: skip
    """The rule of each argument, which `argument` makes of a name and the rule of a value with its `end`."""
    end_rule = text_rule(end) if end_id is None else token_rule(end_id)

    def rule(name: str, schema: Mapping[str, Any]) -> str:
        if not is_free_text(schema):
            return argument(name, f"{value_rule(function, schema)} {end_rule}")
        if end_id is not None:
            return argument(name, f"/{FREE_TEXT}/ {end_rule}")
        with_end = f"/{FREE_TEXT}{_escaped(end)}/"  # which the greedy text would begin to take
        return argument(name, with_end)

    return each_argument(function, rule)


def call_in_lines(tags: Tags, function: Function) -> str:
    """The rule of a call with a line for its name and for the end of each argument."""

    def argument(name: str, value: str) -> str:
        return f"{text_rule(tags.key[0] + name + tags.key[1] + tags.value[0])} {value}"

    head = text_rule(f"{tags.call[0]}{function.name}{tags.name_end}\n")
    arguments = " ".join(_argument_rules(function, argument, None, tags.value[1] + "\n"))
    return f"{head} {arguments} {text_rule(tags.call[1])}"


def _escaped(text: str) -> str:
    """A text without other special characters, as part of a regular expression."""
    return text.replace("/", r"\/").replace("\n", r"\n")


def is_free_text(schema: Any) -> bool:
    """Whether a value may be any text: it is written without quotation marks, even if it may be something else, too."""
    return isinstance(schema, Mapping) and "string" in _types(schema) and "enum" not in schema


def unquoted(schema: Any) -> str:
    """The texts among which a value is chosen, without quotation marks; "" if it is no such value."""
    choices = schema.get("enum") if isinstance(schema, Mapping) else None
    if not choices or not all(isinstance(choice, str) for choice in choices):
        return ""
    return f"({' | '.join(map(text_rule, choices))})"


# -- GLM, and Hy3 with the same tags in a block ------------------------------------------------------------------------

GLM_TAGS = Tags(("", ""), (TOOL_CALL, END_TOOL_CALL), "", ("<arg_key>", "</arg_key>"), ("<arg_value>", "</arg_value>"))
HY = re.compile(r"<tool_calls(:\w+)?>")
"""What begins a block of Hy3; every tag of a checkpoint may have the same ending."""


def hy_tags(template_source: str) -> Tags | None:
    """The tags of Hy3 in a chat template, with the ending that they have there; None of another template."""
    begin = HY.search(template_source)
    if begin is None or f"<arg_key{begin[1] or ''}>" not in template_source:
        return None
    block, call, key, value = (
        (f"<{name}{begin[1] or ''}>", f"</{name}{begin[1] or ''}>")
        for name in ("tool_calls", "tool_call", "arg_key", "arg_value")
    )
    return Tags(block, call, f"<tool_sep{begin[1] or ''}>", key, value)


def read_glm() -> Reader:
    """`<tool_call>name`, then `<arg_key>…</arg_key><arg_value>…</arg_value>` for each argument, and the end."""
    yield from literal(TOOL_CALL)
    name, char = yield from word((yield from skip_space()))
    values = yield from _pairs(GLM_TAGS, char)
    return [TaggedCall(name, "", values=values)]


def read_hy(tags: Tags) -> Reader:
    """`<tool_calls>`, calls as `<tool_call>name<tool_sep>` with the arguments as GLM_TAGS writes them, and the end."""
    yield from literal(tags.block[0])
    calls: list[Call] = []
    char = yield from skip_space()
    while char:
        expect(char, "<")
        kind = yield
        if calls and kind == "/":
            yield from literal(tags.block[1][2:])
            return calls
        expect(kind, tags.call[0][1])
        yield from literal(tags.call[0][2:])
        name, char = yield from word((yield from skip_space()))
        expect((yield from skip_space()) if char.isspace() else char, "<")
        yield from literal(tags.name_end[1:])
        calls.append(TaggedCall(name, "", values=(yield from _pairs(tags, (yield)))))
        char = yield from skip_space()
    if not calls:
        raise NoCall
    return calls


def _pairs(tags: Tags, char: str) -> Generator[None, str, tuple[tuple[str, str], ...]]:
    """Names and values up to the end of a call, or of the text; `char` is the first character."""
    values: list[tuple[str, str]] = []
    char = (yield from skip_space()) if char.isspace() else char
    while char:
        expect(char, "<")
        kind = yield
        if kind == "/":
            yield from literal(tags.call[1][2:])
            break
        expect(kind, tags.key[0][1])
        yield from literal(tags.key[0][2:])
        key = yield from text_before(tags.key[1])
        expect((yield from skip_space()), tags.value[0][0])
        yield from literal(tags.value[0][1:])
        values.append((key.strip(), (yield from text_before(tags.value[1]))))
        char = yield from skip_space()
    return tuple(values)


def glm_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """Calls with a line for each name and value."""
    line = text_rule("\n")
    start = f"start: block {more_rules('block', line, several)}\n"
    return start + _calls_in_lines(GLM_TAGS, functions, token_id)


def hy_rules(tags: Tags, functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """A block of such calls."""
    begin, end = (marker_rule(text, token_id) for text in tags.block)
    line = text_rule("\n")
    start = f"start: {begin} {line} block {more_rules('block', line, several)} {line} {end}\n"
    return start + _calls_in_lines(tags, functions, token_id)


def _calls_in_lines(tags: Tags, functions: Sequence[Function], token_id: TokenId) -> str:
    """The rules `block`, a call with its tags, and `call`."""
    begin, end = (marker_rule(text, token_id) for text in tags.call)
    name_end = marker_rule(tags.name_end, token_id) if tags.name_end else ""
    line = text_rule("\n")

    def rule(function: Function) -> str:
        arguments = " ".join(_argument_rules(function, argument, token_id(tags.value[1]), tags.value[1]))
        return f"{text_rule(function.name)} {name_end} {arguments} {line}"

    def argument(name: str, value: str) -> str:
        key_begin, key_end, value_begin = (marker_rule(text, token_id) for text in (*tags.key, tags.value[0]))
        return f"{line} {key_begin} {text_rule(name)} {key_end} {line} {value_begin} {value}"

    return f"block: {begin} call {end}\n" + call_rules(map(rule, functions))


GLM = ToolFormat("glm", TOOL_CALL, "", read_glm, glm_rules)


def hy_format(tags: Tags) -> ToolFormat:
    """The format of Hy3 with the tags that a checkpoint has."""
    return ToolFormat("hy", tags.block[0], "", partial(read_hy, tags), partial(hy_rules, tags))


# -- Qwen --------------------------------------------------------------------------------------------------------------

QWEN_TAGS = Tags(
    (TOOL_CALL, END_TOOL_CALL), ("<function=", "</function>"), ">", ("<parameter=", ">"), ("\n", "\n</parameter>")
)


def read_qwen() -> Reader:
    """`<tool_call>`, `<function=name>` with `<parameter=name>`, whose value has lines of its own, and the ends."""
    yield from literal(TOOL_CALL)
    expect((yield from skip_space()), QWEN_TAGS.call[0][0])
    yield from literal(QWEN_TAGS.call[0][1:])
    name = plain_name((yield from text_before(QWEN_TAGS.name_end, most=MOST_NAME)))
    values: list[tuple[str, str]] = []
    while True:
        expect((yield from skip_space()), "<")
        kind = yield
        if kind == "/":
            yield from literal(QWEN_TAGS.call[1][2:])
            break
        expect(kind, QWEN_TAGS.key[0][1])
        yield from literal(QWEN_TAGS.key[0][2:])
        key = yield from text_before(QWEN_TAGS.key[1])
        value = yield from text_before(QWEN_TAGS.value[1].strip())
        values.append((key, value.removeprefix("\n").removesuffix("\n")))
    expect((yield from skip_space()), END_TOOL_CALL[0])
    yield from literal(END_TOOL_CALL[1:])
    return [TaggedCall(name, "", values=tuple(values))]


def qwen_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """Calls with lines for the name, for that of each argument, and for its value."""
    begin, end = (marker_rule(text, token_id) for text in QWEN_TAGS.block)
    line = text_rule("\n")
    start = f"start: block {more_rules('block', line, several)}\nblock: {begin} {line} call {line} {end}\n"
    return start + call_rules(call_in_lines(QWEN_TAGS, function) for function in functions)


QWEN = ToolFormat("qwen", TOOL_CALL, "", read_qwen, qwen_rules)
