"""Grammars that force calls of tools: what those of all formats are made of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpillama.errors import UserError
from mpillama.text.constraint import json_rule, text_rule, token_rule

TokenId = Callable[[str], int | None]
"""The id of a text that is a token of its own, such as `Grammars.token_id`."""

Rules = Callable[["Sequence[Function]", bool, TokenId], str]
"""Makes a grammar of the functions that may be called, whether several times, and the tokenizer's special tokens."""


@dataclass(frozen=True)
class Function:
    """A function that may be called, and the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]


def chosen_functions(tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any]) -> list[Function]:
    """The functions of which one must be called, none if none must; UserError if there is no such function."""
    if choice in ("none", "auto"):
        return []
    functions = [_function(tool["function"]) for tool in tools]
    if choice != "required":
        wanted = choice["function"]["name"] if isinstance(choice, Mapping) else choice
        functions = [function for function in functions if function.name == wanted]
    if not functions:
        raise UserError("tool_choice asks for a function that is not among the tools; add it or choose another.")
    return functions


def _function(given: Mapping[str, Any]) -> Function:
    """A tool's function; one without parameters takes no arguments, and arguments are always an object."""
    parameters = given.get("parameters") or {"properties": {}, "additionalProperties": False}
    if parameters.get("type", "object") != "object":
        raise UserError(f"The parameters of the function {given['name']!r} must be of the type 'object'; correct that.")
    return Function(given["name"], {"type": "object", **parameters})


def calls_or_json(grammar: str, schema: Mapping[str, Any]) -> str:
    """A grammar of calls, which `grammar` is, or of one JSON value that fits `schema`."""
    return f"start: calls | json\njson: {json_rule(schema)}\ncalls:{grammar.removeprefix('start:')}"


def arguments_rule(function: Function) -> str:
    return schema_rule(function, function.parameters)


def schema_rule(function: Function, schema: Mapping[str, Any]) -> str:
    """JSON that fits a schema of a function; UserError names the function."""
    try:
        return json_rule(schema)
    except UserError as error:
        raise UserError(f"The parameters of the function {function.name!r}: {error}") from error


def properties_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters that a schema of a function names, each with its schema."""
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def within(schema: Any, shared: Mapping[str, Any]) -> Mapping[str, Any]:
    """A parameter's schema with the definitions of the whole; one that says no more than yes has none of its own."""
    return {**shared, **schema} if isinstance(schema, Mapping) else shared


def call_rules(rules: Iterable[str]) -> str:
    """The rule `call`: any one of `rules`."""
    named = {f"call_{index}": rule for index, rule in enumerate(rules)}
    lines = (f"{name}: {rule}\n" for name, rule in named.items())
    return f"call: {' | '.join(named)}\n" + "".join(lines)


def more_rules(rule: str, separator: str, several: bool) -> str:
    """Any number of further ones, if several are wanted."""
    return f"({separator} {rule})*" if several else ""


def marker_rule(text: str, token_id: TokenId) -> str:
    """A marker as the token that it is, or else as text."""
    known = token_id(text)
    return text_rule(text) if known is None else token_rule(known)
