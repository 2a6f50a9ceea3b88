"""Calls that models write as JSON objects: Hermes (Qwen and many others), Llama 3, Mistral, Phi-4-mini, Granite 3."""

import json
from collections.abc import Generator, Sequence

from mpillama.openai.tool_calls import SHORT_ID, ToolFormat
from mpillama.openai.tool_grammars import Function, TokenId, arguments_rule, call_rules, marker_rule, more_rules
from mpillama.openai.tool_readers import Call, NoCall, Reader, expect, literal, read_object, skip_space, word
from mpillama.text.constraint import text_rule, token_rule

TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
LISTED_CALLS, END_LISTED_CALLS = "<|tool_call|>", "<|/tool_call|>"
TOOL_CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"

# A call begins with one of these; other objects are let go at once.
FIRST_KEYS = frozenset(["name", "arguments", "parameters", "type", "id"])


def read_object_call(char: str) -> Generator[None, str, Call]:
    """An object with a name and arguments, or parameters, that are an object."""
    found = yield from read_object(char, FIRST_KEYS)
    name = _name(found.members.get("name", ""))
    arguments = found.members.get("arguments", found.members.get("parameters", ""))
    expect(arguments[:1], "{")
    return Call(name, arguments)


def _name(text: str) -> str:
    """The string that the JSON `text` is; NoCall if it is none, empty or no Unicode."""
    if text[:1] != '"':
        raise NoCall
    name = str(json.loads(text))
    # Half a surrogate pair can be escaped in JSON, but not sent to anyone.
    if not name or any("\ud800" <= char <= "\udfff" for char in name):
        raise NoCall
    return name


def _listed() -> Generator[None, str, list[Call]]:
    """Objects behind the bracket that opens their list."""
    calls, char = [], ""
    while char != "]":
        calls.append((yield from read_object_call((yield from skip_space()))))
        char = yield from skip_space()
        if char not in ("]", ","):
            raise NoCall
    return calls


def _object_call(function: Function, key: str, rest: str = "") -> str:
    """`{"name": ..., "<key>": ...}` with spaces as json.dumps sets them, which models have learnt."""
    head = f'{{"name": {text_rule(function.name)}, "{key}": '
    return f'{text_rule(head)} {arguments_rule(function)} {rest} "}}"'


# -- Hermes ------------------------------------------------------------------------------------------------------------


def read_hermes() -> Reader:
    """`<tool_call>{"name": ..., "arguments": ...}</tool_call>`; the end of the text closes it as well."""
    yield from literal(TOOL_CALL)
    call = yield from read_object_call((yield from skip_space()))
    char = yield from skip_space()
    if char:
        expect(char, END_TOOL_CALL[0])
        yield from literal(END_TOOL_CALL[1:])
    return [call]


def hermes_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """`<tool_call>` blocks, each on lines of its own."""
    begin, line, end = marker_rule(TOOL_CALL, token_id), text_rule("\n"), marker_rule(END_TOOL_CALL, token_id)
    start = f"start: block {more_rules('block', line, several)}\nblock: {begin} {line} call {line} {end}\n"
    return start + call_rules(_object_call(function, "arguments") for function in functions)


HERMES = ToolFormat("hermes", TOOL_CALL, "", read_hermes, hermes_rules)


# -- Llama 3 -----------------------------------------------------------------------------------------------------------


def read_llama3() -> Reader:
    """`{"name": ..., "parameters": ...}; ...` to the end of the text, perhaps after `<|python_tag|>`."""
    char = yield
    if char == PYTHON_TAG[0]:
        yield from literal(PYTHON_TAG[1:])
        char = yield from skip_space()
    calls = []
    while char:
        calls.append((yield from read_object_call(char)))
        char = yield from skip_space()
        if char:
            expect(char, ";")
            char = yield from skip_space()
    if not calls:
        raise NoCall
    return calls


def llama3_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """Objects with `parameters`, separated by semicolons, perhaps after `<|python_tag|>`."""
    known = token_id(PYTHON_TAG)
    tag = "" if known is None else f"{token_rule(known)}?"
    start = f"start: {tag} call {more_rules('call', text_rule('; '), several)}\n"
    return start + call_rules(_object_call(function, "parameters") for function in functions)


LLAMA3 = ToolFormat("llama3", PYTHON_TAG, "{", read_llama3, llama3_rules)


# -- Mistral -----------------------------------------------------------------------------------------------------------


def read_mistral() -> Reader:
    """`[TOOL_CALLS][{"name": ..., "arguments": ...}, ...]`, or a newer model's `[TOOL_CALLS]name[ARGS]{...}`."""
    yield from literal(TOOL_CALLS)
    char = yield from skip_space()
    if char != "[":
        return [(yield from _named_call(char))]
    return (yield from _listed())


def _named_call(char: str) -> Generator[None, str, Call]:
    """`name[ARGS]{...}`, with `[CALL_ID]id` before `[ARGS]` from some models."""
    name, char = yield from word(char)
    expect(char, ARGS[0])
    marker = yield
    if marker == CALL_ID[1]:
        yield from literal(CALL_ID[2:])
        _, char = yield from word((yield))
        expect(char, ARGS[0])
        marker = yield
    expect(marker, ARGS[1])
    yield from literal(ARGS[2:])
    found = yield from read_object((yield from skip_space()))
    return Call(name, found.text)


def mistral_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """`[TOOL_CALLS]` and a list of objects, each perhaps with an id of 9 characters."""
    more = more_rules("call", text_rule(", "), several)
    start = f'start: {marker_rule(TOOL_CALLS, token_id)} " "? "[" call {more} "]"\n'
    before_id, quote = text_rule(', "id": "'), text_rule('"')
    call_id = f"({before_id} /{SHORT_ID}/ {quote})?"
    return start + call_rules(_object_call(function, "arguments", call_id) for function in functions)


def mistral_args_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """`[TOOL_CALLS]name[ARGS]{...}`, one after the other."""
    begin, arguments = marker_rule(TOOL_CALLS, token_id), marker_rule(ARGS, token_id)
    start = f"start: block {more_rules('block', '', several)}\nblock: {begin} call\n"
    rules = (f"{text_rule(function.name)} {arguments} {arguments_rule(function)}" for function in functions)
    return start + call_rules(rules)


MISTRAL = ToolFormat("mistral", TOOL_CALLS, "", read_mistral, mistral_rules, short_ids=True)
MISTRAL_ARGS = ToolFormat("mistral-args", TOOL_CALLS, "", read_mistral, mistral_args_rules, short_ids=True)


# -- Phi-4-mini and Granite 3 ------------------------------------------------------------------------------------------


def read_listed() -> Reader:
    """`<|tool_call|>[{"name": ..., "arguments": ...}, ...]`, of Phi-4-mini closed by `<|/tool_call|>`."""
    yield from literal(LISTED_CALLS)
    expect((yield from skip_space()), "[")
    calls = yield from _listed()
    char = yield from skip_space()
    if char:
        expect(char, END_LISTED_CALLS[0])
        yield from literal(END_LISTED_CALLS[1:])
    return calls


def listed_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """A marker and a list of objects, closed where the vocabulary has a token for that."""
    end = token_id(END_LISTED_CALLS)
    more = more_rules("call", text_rule(", "), several)
    closing = "" if end is None else token_rule(end)
    start = f'start: {marker_rule(LISTED_CALLS, token_id)} "[" call {more} "]" {closing}\n'
    return start + call_rules(_object_call(function, "arguments") for function in functions)


LISTED = ToolFormat("listed", LISTED_CALLS, "", read_listed, listed_rules)
