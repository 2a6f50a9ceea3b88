"""Calls that models write as Python: those of Llama 4, which may also be JSON.

An answer is `[name(key="value", other=3), name()]` or `{"name": ..., "parameters": ...}`, one after the other, and
nothing else, perhaps between `<|python_start|>` and `<|python_end|>`.
"""

import ast
import json
import re
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mpillama.errors import UserError
from mpillama.openai.object_calls import llama3_rules, read_object_call
from mpillama.openai.tool_calls import ToolFormat
from mpillama.openai.tool_grammars import (
    Function,
    TokenId,
    call_rules,
    more_rules,
    properties_of,
    schema_rule,
    within,
)
from mpillama.openai.tool_readers import (
    MOST_NAME,
    NAME,
    Call,
    NoCall,
    Reader,
    expect,
    literal,
    skip_space,
)
from mpillama.text.constraint import text_rule

PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"
SHOWN = re.compile(r"\[\w+\(\w+=")
"""How a chat template shows the model what a call looks like."""
WORDS = {"true": True, "false": False, "null": None}
"""What models take from JSON."""
CLOSES = {"(": ")", "[": "]", "{": "}"}


def read_llama4() -> Reader:
    """Calls in Python or in JSON up to the end of the text."""
    char, is_tagged = (yield), False
    if char == PYTHON_START[0]:
        yield from literal(PYTHON_START[1:])
        char, is_tagged = (yield from skip_space()), True
    char = (yield from skip_space()) if char.isspace() else char
    calls = (yield from _listed()) if char == "[" else []
    char = (yield from skip_space()) if calls else char
    while char == "{":
        calls.append((yield from read_object_call(char)))
        char = yield from skip_space()
        char = (yield from skip_space()) if char == ";" else char
    if is_tagged and calls and char == PYTHON_END[0]:
        yield from literal(PYTHON_END[1:])
        char = yield from skip_space()
    if char or not calls:
        raise NoCall
    return calls


def _listed() -> Generator[None, str, list[Call]]:
    """Calls behind the bracket that opens their list."""
    calls = []
    while True:
        calls.append((yield from _called((yield from skip_space()))))
        char = yield from skip_space()
        if char == "]":
            return calls
        expect(char, ",")


def _called(char: str) -> Generator[None, str, Call]:
    """`name(key=value, ...)`."""
    name = ""
    while char and re.fullmatch(NAME, char) and len(name) <= MOST_NAME:
        name, char = name + char, (yield)
    if not name or char != "(":
        raise NoCall
    text = yield from _up_to_end()
    try:
        with warnings.catch_warnings(action="ignore"):  # of what models write, such as "\d", nobody wants to hear
            call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise NoCall
        arguments = {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        written.encode()  # half a surrogate pair can be escaped, but not sent to anyone
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NoCall from error
    return Call(name, written)


def _up_to_end() -> Generator[None, str, str]:
    """The text up to the parenthesis that closes a call, which is taken as well."""
    text, quote, open_ones, escaped = list[str](), "", [")"], False
    while open_ones:
        char = yield
        if not char or (quote and char == "\n"):
            raise NoCall
        text.append(char)
        if quote:
            quote = "" if char == quote and not escaped else quote
            escaped = char == "\\" and not escaped
        elif char in "\"'":
            quote = char
        elif char in CLOSES:
            open_ones.append(CLOSES[char])
        elif char in CLOSES.values():
            expect(char, open_ones.pop())
    return "".join(text[:-1])


def _value(node: ast.expr) -> Any:
    """A value that JSON has, too."""
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str | int | float)):
        # Pairs that JSON's escapes write in two halves.
        return (
            node.value.encode("utf-16", "surrogatepass").decode("utf-16") if isinstance(node.value, str) else node.value
        )
    if isinstance(node, ast.Name) and node.id in WORDS:
        return WORDS[node.id]
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_value(key) if key is not None else None for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return {key: _value(value) for key, value in zip(keys, node.values, strict=True)}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        number = node.operand.value
        if isinstance(number, int | float) and not isinstance(number, bool):
            return -number
    raise NoCall


def json_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """Objects as Llama 3 writes them, without its tag."""
    return llama3_rules(functions, several, lambda text: None)


def pythonic_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """A list of calls, their arguments in the order of the schema; values within lists and objects are JSON."""
    start = f"start: {text_rule('[')} call {more_rules('call', text_rule(', '), several)} {text_rule(']')}\n"
    return start + call_rules(f"{text_rule(function.name)} {_in_parentheses(function)}" for function in functions)


def _in_parentheses(function: Function) -> str:
    """Each argument that is required, and those that are not as a further choice behind them."""
    outer = function.parameters
    schema_rule(function, outer)  # names what is wrong with it
    required = [(name, rule) for name, rule in _arguments(function) if name in outer.get("required", ())]
    others = [(name, rule) for name, rule in _arguments(function) if name not in outer.get("required", ())]
    comma = text_rule(", ")
    rules = f" {comma} ".join(rule for _, rule in required)
    for number, (_, rule) in enumerate(others):
        rules += f" ({comma} {rule})?" if required else ""
        if not required:
            more = " ".join(f"({comma} {later})?" for _, later in others[number + 1 :])
            rules += f"{' | ' if number else ''}{rule} {more}"
    body = rules if required else f"({rules})?" if rules else ""
    return f"{text_rule('(')} {body} {text_rule(')')}"


def _arguments(function: Function) -> Iterator[tuple[str, str]]:
    outer = function.parameters
    shared = {key: outer[key] for key in ("$defs", "definitions") if key in outer}
    for name, schema in properties_of(outer).items():
        if not name.isidentifier():
            raise UserError(f"The parameters of the function {function.name!r}: {name!r} is no name in Python.")
        yield name, f"{text_rule(name + '=')} {_value_rule(function, within(schema, shared))}"


def _value_rule(function: Function, schema: Mapping[str, Any]) -> str:
    if schema.get("type") == "boolean":
        return '("True" | "False")'
    return schema_rule(function, schema)


LLAMA4 = ToolFormat("llama4", PYTHON_START, "[{", read_llama4, json_rules)
LLAMA4_PYTHONIC = replace(LLAMA4, name="llama4-pythonic", rules=pythonic_rules)
