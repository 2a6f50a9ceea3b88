"""Reading calls of tools: what the readers of all formats are made of.

A reader is a generator that is sent character after character, "" for the end of the text. It raises NoCall at the
first character that cannot belong to a call, and returns the calls with the last one that does.
"""

import math
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from mpillama.openai.tool_json import JsonObject, NotJson

NAME = re.compile(r"[a-zA-Z0-9_.-]+")
MOST_NAME = 256
"""Characters of a name, and of what stands around it, at the most."""


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


def plain_name(name: str) -> str:
    """A name as functions have it; NoCall for another text."""
    if not NAME.fullmatch(name):
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


def read_object(char: str, first_keys: frozenset[str] | None = None) -> Generator[None, str, JsonObject]:
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
