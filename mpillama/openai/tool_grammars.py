"""Grammars that force calls of tools in a model's own format."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpillama.errors import UserError
from mpillama.openai.tool_readers import (
    ARGS,
    DEEPSEEK_MARKS,
    END_FENCE,
    END_LISTED_CALLS,
    END_TOOL_CALL,
    FENCE,
    KIMI_MARKS,
    LISTED_CALLS,
    PYTHON_TAG,
    TOOL_CALL,
    TOOL_CALLS,
    Marks,
)
from mpillama.text.constraint import json_rule, text_rule, token_rule

# Mistral's templates insist on this form.
MISTRAL_ID = "[a-zA-Z0-9]{9}"

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


def hermes_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """`<tool_call>` blocks, each on lines of its own."""
    begin, line, end = marker_rule(TOOL_CALL, token_id), text_rule("\n"), marker_rule(END_TOOL_CALL, token_id)
    start = f"start: block {more_rules('block', line, several)}\nblock: {begin} {line} call {line} {end}\n"
    return start + call_rules(_object_call(function, "arguments") for function in functions)


def llama3_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """Objects with `parameters`, separated by semicolons, perhaps after `<|python_tag|>`."""
    known = token_id(PYTHON_TAG)
    tag = "" if known is None else f"{token_rule(known)}?"
    start = f"start: {tag} call {more_rules('call', text_rule('; '), several)}\n"
    return start + call_rules(_object_call(function, "parameters") for function in functions)


def mistral_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """`[TOOL_CALLS]` and a list of objects, each perhaps with an id of 9 characters."""
    more = more_rules("call", text_rule(", "), several)
    start = f'start: {marker_rule(TOOL_CALLS, token_id)} " "? "[" call {more} "]"\n'
    before_id, quote = text_rule(', "id": "'), text_rule('"')
    call_id = f"({before_id} /{MISTRAL_ID}/ {quote})?"
    return start + call_rules(_object_call(function, "arguments", call_id) for function in functions)


def listed_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """A marker and a list of objects, closed where the vocabulary has a token for that."""
    end = token_id(END_LISTED_CALLS)
    more = more_rules("call", text_rule(", "), several)
    closing = "" if end is None else token_rule(end)
    start = f'start: {marker_rule(LISTED_CALLS, token_id)} "[" call {more} "]" {closing}\n'
    return start + call_rules(_object_call(function, "arguments") for function in functions)


def mistral_args_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """`[TOOL_CALLS]name[ARGS]{...}`, one after the other."""
    begin, arguments = marker_rule(TOOL_CALLS, token_id), marker_rule(ARGS, token_id)
    start = f"start: block {more_rules('block', '', several)}\nblock: {begin} call\n"
    rules = (f"{text_rule(function.name)} {arguments} {_arguments(function)}" for function in functions)
    return start + call_rules(rules)


def deepseek_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """Marked calls as V3.1 writes them."""
    before = marker_rule(DEEPSEEK_MARKS.before_arguments, token_id)
    rules = (f"{text_rule(function.name)} {before} {_arguments(function)}" for function in functions)
    return _marked(DEEPSEEK_MARKS, several, token_id) + call_rules(rules)


def deepseek_fenced_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """Marked calls as V3 and R1 write them."""
    kind, end = (
        f"{text_rule('function')} {marker_rule(DEEPSEEK_MARKS.before_arguments, token_id)}",
        text_rule("\n" + END_FENCE),
    )
    rules = (f"{kind} {text_rule(function.name + FENCE)} {_arguments(function)} {end}" for function in functions)
    return _marked(DEEPSEEK_MARKS, several, token_id, text_rule("\n")) + call_rules(rules)


def kimi_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """Marked calls with ids that name the function."""
    before = marker_rule(KIMI_MARKS.before_arguments, token_id)
    rules = (
        f"{text_rule(f'functions.{function.name}:')} /[0-9]{{1,3}}/ {before} {_arguments(function)}"
        for function in functions
    )
    return _marked(KIMI_MARKS, several, token_id) + call_rules(rules)


def _marked(marks: Marks, several: bool, token_id: TokenId, separator: str = "") -> str:
    """The rules `start` and `block` of calls between marks."""
    begin, begin_call, end_call, end = (
        marker_rule(text, token_id) for text in (marks.begin, marks.begin_call, marks.end_call, marks.end)
    )
    return (
        f"start: {begin} block {more_rules('block', separator, several)} {end}\nblock: {begin_call} call {end_call}\n"
    )


def calls_or_json(grammar: str, schema: Mapping[str, Any]) -> str:
    """A grammar of calls, which `grammar` is, or of one JSON value that fits `schema`."""
    return f"start: calls | json\njson: {json_rule(schema)}\ncalls:{grammar.removeprefix('start:')}"


def _function(given: Mapping[str, Any]) -> Function:
    """A tool's function; one without parameters takes no arguments, and arguments are always an object."""
    parameters = given.get("parameters") or {"properties": {}, "additionalProperties": False}
    if parameters.get("type", "object") != "object":
        raise UserError(f"The parameters of the function {given['name']!r} must be of the type 'object'; correct that.")
    return Function(given["name"], {"type": "object", **parameters})


def _object_call(function: Function, key: str, rest: str = "") -> str:
    """`{"name": ..., "<key>": ...}` with spaces as json.dumps sets them, which models have learnt."""
    head = f'{{"name": {text_rule(function.name)}, "{key}": '
    return f'{text_rule(head)} {_arguments(function)} {rest} "}}"'


def _arguments(function: Function) -> str:
    return schema_rule(function, function.parameters)


def schema_rule(function: Function, schema: Mapping[str, Any]) -> str:
    """JSON that fits a schema of a function; UserError names the function."""
    try:
        return json_rule(schema)
    except UserError as error:
        raise UserError(f"The parameters of the function {function.name!r}: {error}") from error


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
