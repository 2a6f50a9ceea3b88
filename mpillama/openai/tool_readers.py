"""How models write calls of tools: one reader a format, fed with characters until it knows.

A reader is a generator that is sent character after character, "" for the end of the text. It raises NoCall at the
first character that cannot belong to a call, and returns the calls with the last one that does.
"""

import json
import math
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from mpillama.openai.tool_json import JsonObject, NotJson

TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
LISTED_CALLS, END_LISTED_CALLS = "<|tool_call|>", "<|/tool_call|>"
TOOL_CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


@dataclass(frozen=True)
class Marks:
    """The tokens around calls and each of them, and what stands before its arguments."""

    begin: str
    begin_call: str
    before_arguments: str
    end_call: str
    end: str


DEEPSEEK_MARKS = Marks(
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
)
KIMI_MARKS = Marks(
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
)
FENCE, END_FENCE = "\n```json\n", "```"
"""What DeepSeek V3 and R1 write around the arguments."""

NAME = re.compile(r"[a-zA-Z0-9_.-]+")
MOST_NAME = 256
"""Characters of a name, and of what stands around it, at the most."""

# A call begins with one of these; other objects are let go at once.
FIRST_KEYS = frozenset(["name", "arguments", "parameters", "type", "id"])


class NoCall(Exception):  # noqa: N818 - nobody's error: most text is no call
    """The characters so far are the beginning of no call."""


@dataclass(frozen=True)
class Call:
    """A function's name, its arguments as the JSON object that the model wrote, and the id if it gave one."""

    name: str
    arguments: str
    id: str | None = None

    def typed(self, parameters: Mapping[str, Any] | None) -> str:
        """The arguments; `parameters` is the schema that the function gives for them, if that is known."""
        return self.arguments


Reader = Generator[None, str, list[Call]]
Part = Generator[None, str, str]


def read_hermes() -> Reader:
    """`<tool_call>{"name": ..., "arguments": ...}</tool_call>`; the end of the text closes it as well."""
    yield from literal(TOOL_CALL)
    call = yield from read_object_call((yield from skip_space()))
    char = yield from skip_space()
    if char:
        expect(char, END_TOOL_CALL[0])
        yield from literal(END_TOOL_CALL[1:])
    return [call]


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


def read_mistral() -> Reader:
    """`[TOOL_CALLS][{"name": ..., "arguments": ...}, ...]`, or a newer model's `[TOOL_CALLS]name[ARGS]{...}`."""
    yield from literal(TOOL_CALLS)
    char = yield from skip_space()
    if char != "[":
        return [(yield from _named_call(char))]
    return (yield from _listed())


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


def _listed() -> Generator[None, str, list[Call]]:
    """Objects behind the bracket that opens their list."""
    calls, char = [], ""
    while char != "]":
        calls.append((yield from read_object_call((yield from skip_space()))))
        char = yield from skip_space()
        if char not in ("]", ","):
            raise NoCall
    return calls


def read_deepseek() -> Reader:
    """Marked calls: of V3 and R1 `function`, the name and fenced arguments, of V3.1 the name and the arguments."""
    return _marked_calls(DEEPSEEK_MARKS, _deepseek_call)


def read_kimi() -> Reader:
    """Marked calls, each named by the id `functions.NAME:NUMBER`."""
    return _marked_calls(KIMI_MARKS, _kimi_call)


def _marked_calls(marks: Marks, read: Callable[[str], Generator[None, str, Call]]) -> Reader:
    """Calls one after the other; the end of the text closes them as well. `read` is given what names the call."""
    yield from literal(marks.begin)
    same = next(i for i, (a, b) in enumerate(zip(marks.begin_call, marks.end, strict=False)) if a != b)
    calls: list[Call] = []
    char = yield from skip_space()
    while char:
        expect(char, marks.end[0])
        yield from literal(marks.end[1:same])
        char = yield
        if calls and char == marks.end[same]:
            yield from literal(marks.end[same + 1 :])
            return calls
        expect(char, marks.begin_call[same])
        yield from literal(marks.begin_call[same + 1 :])
        calls.append((yield from read((yield from text_before(marks.before_arguments, most=MOST_NAME)))))
        char = yield from skip_space()
        if char:
            expect(char, marks.end_call[0])
            yield from literal(marks.end_call[1:])
            char = yield from skip_space()
    if not calls:
        raise NoCall
    return calls


def _deepseek_call(kind: str) -> Generator[None, str, Call]:
    char = yield from skip_space()
    if char == "{":
        return Call(plain_name(kind.strip()), (yield from _object(char)).text)
    name = yield from text_before(FENCE, char, MOST_NAME)
    found = yield from _object((yield from skip_space()))
    expect((yield from skip_space()), END_FENCE[0])
    yield from literal(END_FENCE[1:])
    return Call(plain_name(name.strip()), found.text)


def _kimi_call(call_id: str) -> Generator[None, str, Call]:
    call_id = call_id.strip()
    name, colon, number = call_id.removeprefix("functions.").rpartition(":")
    found = yield from _object((yield from skip_space()))
    if not colon or not number.isdecimal():
        raise NoCall
    return Call(plain_name(name), found.text, call_id)


def plain_name(name: str) -> str:
    """A name as functions have it; NoCall for another text."""
    if not NAME.fullmatch(name):
        raise NoCall
    return name


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
    found = yield from _object((yield from skip_space()))
    return Call(name, found.text)


def read_object_call(char: str) -> Generator[None, str, Call]:
    """An object with a name and arguments, or parameters, that are an object."""
    found = yield from _object(char, FIRST_KEYS)
    name = _name(found.members.get("name", ""))
    arguments = found.members.get("arguments", found.members.get("parameters", ""))
    expect(arguments[:1], "{")
    return Call(name, arguments)


def _object(char: str, first_keys: frozenset[str] | None = None) -> Generator[None, str, JsonObject]:
    """A JSON object that begins with `char`; its first key must be one of `first_keys`, if given."""
    found = JsonObject()
    try:
        while not found.push(char):
            if first_keys is not None and found.first_key is not None and found.first_key not in first_keys:
                raise NoCall
            char = yield
    except NotJson as error:
        raise NoCall from error
    return found


def _name(text: str) -> str:
    """The string that the JSON `text` is; NoCall if it is none, empty or no Unicode."""
    if text[:1] != '"':
        raise NoCall
    name = str(json.loads(text))
    # Half a surrogate pair can be escaped in JSON, but not sent to anyone.
    if not name or any("\ud800" <= char <= "\udfff" for char in name):
        raise NoCall
    return name


def word(char: str) -> Generator[None, str, tuple[str, str]]:
    """A function's name, which begins with `char`, and the character behind it."""
    name = ""
    while char and NAME.fullmatch(char):
        name, char = name + char, (yield)
        if len(name) > MOST_NAME:
            raise NoCall
    if not name:
        raise NoCall
    return name, char


def text_before(mark: str, begun: str = "", most: float = math.inf) -> Part:
    """The text up to a mark, which is taken as well; it begins with `begun` and has `most` characters at the most."""
    taken, end = list(begun), begun  # `end`: as many of the last characters as the mark has
    while end != mark:
        char = yield
        if not char or len(taken) > most + len(mark):
            raise NoCall
        taken.append(char)
        end = (end + char)[-len(mark) :]
    return "".join(taken)[: -len(mark)]


def literal(text: str) -> Generator[None, str, None]:
    for expected in text:
        expect((yield), expected)


def skip_space() -> Part:
    """The first character that is no space, "" if the text ends."""
    char = yield
    while char.isspace():
        char = yield
    return char


def expect(char: str, expected: str) -> None:
    if char != expected:
        raise NoCall
