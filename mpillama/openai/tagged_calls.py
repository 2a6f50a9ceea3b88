"""Calls that models write with a tag around each argument: those of GLM and of MiniMax.

A value is there as it is, without quotation marks if it is a text; what the function asks for tells what it means.
"""

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpillama.openai.tool_grammars import Function, TokenId, call_rules, marker_rule, more_rules, schema_rule
from mpillama.openai.tool_json import strict_json
from mpillama.openai.tool_readers import (
    END_TOOL_CALL,
    MOST_NAME,
    TOOL_CALL,
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


@dataclass(frozen=True)
class Tags:
    """What stands around a block of calls, each call, its name, and names and values of arguments."""

    block: tuple[str, str]
    call: tuple[str, str]
    name_end: str
    key: tuple[str, str]
    value: tuple[str, str]


GLM = Tags(("", ""), (TOOL_CALL, END_TOOL_CALL), "", ("<arg_key>", "</arg_key>"), ("<arg_value>", "</arg_value>"))
MINIMAX = Tags(
    ("<minimax:tool_call>", "</minimax:tool_call>"),
    ('<invoke name="', "</invoke>"),
    '">',
    ('<parameter name="', '"'),
    (">", "</parameter>"),
)


@dataclass(frozen=True)
class TaggedCall(Call):
    """A call whose values wait for the types that the function asks for."""

    values: tuple[tuple[str, str], ...] = ()

    def typed(self, parameters: Mapping[str, Any] | None) -> str:
        """The arguments as a JSON object, by the schema of the function's parameters."""
        known = (parameters or {}).get("properties", {})
        members = (
            f"{json.dumps(key, ensure_ascii=False)}: {_as_json(text, known.get(key))}" for key, text in self.values
        )
        return "{" + ", ".join(members) + "}"


def _as_json(text: str, schema: Any) -> str:
    """A value in JSON: a text stays one if nothing else is asked for, or if it is no JSON."""
    if _types(schema) != {"string"}:
        try:
            found = strict_json(text)
        except (ValueError, RecursionError):
            pass
        else:
            if not isinstance(found, str) or "string" not in _types(schema):
                return text.strip()
    return json.dumps(text, ensure_ascii=False)


def _types(schema: Any) -> set[str]:
    """The JSON types that a schema names, as far as it does so plainly."""
    if not isinstance(schema, Mapping):
        return set()
    given = schema.get("type")
    found = {given} if isinstance(given, str) else set(given) if isinstance(given, list) else set()
    if not found and all(isinstance(value, str) for value in schema.get("enum", [0])):
        return {"string"}
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        found |= _types(part)
    return found


# -- reading ----------------------------------------------------------------------------------------------------------


def read_glm() -> Reader:
    """`<tool_call>name`, then `<arg_key>…</arg_key><arg_value>…</arg_value>` for each argument, and the end."""
    yield from literal(TOOL_CALL)
    name, char = yield from word((yield from skip_space()))
    values: list[tuple[str, str]] = []
    char = (yield from skip_space()) if char.isspace() else char
    while char:
        expect(char, "<")
        kind = yield
        if kind == "/":
            yield from literal(END_TOOL_CALL[2:])
            break
        expect(kind, GLM.key[0][1])
        yield from literal(GLM.key[0][2:])
        key = yield from text_before(GLM.key[1])
        expect((yield from skip_space()), GLM.value[0][0])
        yield from literal(GLM.value[0][1:])
        values.append((key.strip(), (yield from text_before(GLM.value[1]))))
        char = yield from skip_space()
    return [TaggedCall(name, "", values=tuple(values))]


def read_minimax() -> Reader:
    """`<minimax:tool_call>`, calls as `<invoke name="…">` with `<parameter name="…">`, and the end."""
    yield from literal(MINIMAX.block[0])
    calls: list[Call] = []
    char = yield from skip_space()
    while char:
        expect(char, "<")
        kind = yield
        if calls and kind == "/":
            yield from literal(MINIMAX.block[1][2:])
            return calls
        expect(kind, MINIMAX.call[0][1])
        yield from literal(MINIMAX.call[0][2:])
        calls.append((yield from _invoked()))
        char = yield from skip_space()
    if not calls:
        raise NoCall
    return calls


def _invoked() -> Generator[None, str, Call]:
    """A call from its name on."""
    name = plain_name((yield from text_before('"', most=MOST_NAME)))
    yield from literal(">")
    values: list[tuple[str, str]] = []
    while True:
        expect((yield from skip_space()), "<")
        kind = yield
        if kind == "/":
            yield from literal(MINIMAX.call[1][2:])
            return TaggedCall(name, "", values=tuple(values))
        expect(kind, MINIMAX.key[0][1])
        yield from literal(MINIMAX.key[0][2:])
        key = yield from text_before(MINIMAX.key[1])
        yield from literal(MINIMAX.value[0])
        values.append((key, (yield from text_before(MINIMAX.value[1]))))


# -- forcing ----------------------------------------------------------------------------------------------------------

FREE_TEXT = r"(<+[^<\/]|[^<])*"
"""A text in which nothing ends a tag."""


def glm_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """Calls with a line for each name and value."""
    begin, end = (marker_rule(text, token_id) for text in GLM.call)
    line = text_rule("\n")
    start = f"start: block {more_rules('block', line, several)}\nblock: {begin} call {end}\n"

    def rule(function: Function) -> str:
        arguments = " ".join(_arguments(function, argument, token_id(GLM.value[1]), GLM.value[1]))
        return f"{text_rule(function.name)} {arguments} {line}"

    def argument(name: str, value: str) -> str:
        key_begin, key_end, value_begin = (marker_rule(text, token_id) for text in (*GLM.key, GLM.value[0]))
        return f"{line} {key_begin} {text_rule(name)} {key_end} {line} {value_begin} {value}"

    return start + call_rules(map(rule, functions))


def minimax_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """A block of calls, each on lines of its own."""
    begin, end = (marker_rule(text, token_id) for text in MINIMAX.block)
    line = text_rule("\n")
    start = f"start: {begin} {line} call {line} {more_rules('', f'call {line}', several)} {end}\n"

    def rule(function: Function) -> str:
        head = text_rule(f"{MINIMAX.call[0]}{function.name}{MINIMAX.name_end}\n")
        arguments = " ".join(_arguments(function, argument, None, MINIMAX.value[1] + "\n"))
        return f"{head} {arguments} {text_rule(MINIMAX.call[1])}"

    def argument(name: str, value: str) -> str:
        return f"{text_rule(MINIMAX.key[0] + name + MINIMAX.key[1] + MINIMAX.value[0])} {value}"

    return start + call_rules(map(rule, functions))


def _arguments(
    function: Function, argument: Callable[[str, str], str], end_id: int | None, end: str
) -> Iterator[str]:  # fmt: skip
    """The rule of each argument in the order of the schema; those that are not required may be left out.

    `argument` makes it of a name and the rule of a value with its `end`, which may be a token.
    """
    outer = function.parameters
    shared = {key: outer[key] for key in ("$defs", "definitions") if key in outer}
    end_rule = text_rule(end) if end_id is None else token_rule(end_id)
    for name, schema in outer.get("properties", {}).items():
        if _is_free_text(schema):  # with its end, which the greedy text would begin to take
            value = f"/{FREE_TEXT}/ {end_rule}" if end_id is not None else f"/{FREE_TEXT}{_escaped(end)}/"
        else:
            value = f"{_unquoted(schema) or schema_rule(function, {**shared, **schema})} {end_rule}"
        rule = argument(name, value)
        yield rule if name in outer.get("required", ()) else f"({rule})?"


def _escaped(text: str) -> str:
    """A text without other special characters, as part of a regular expression."""
    return text.replace("/", r"\/").replace("\n", r"\n")


def _is_free_text(schema: Any) -> bool:
    return _types(schema) == {"string"} and isinstance(schema, Mapping) and "enum" not in schema


def _unquoted(schema: Any) -> str:
    """The texts among which a value is chosen, without quotation marks; "" if it is no such value."""
    choices = schema.get("enum") if isinstance(schema, Mapping) else None
    if not choices or not all(isinstance(choice, str) for choice in choices):
        return ""
    return f"({' | '.join(map(text_rule, choices))})"
