"""A JSON object read character by character: its end is known at once, and so is text that is no JSON."""

import json
import re
from collections.abc import Callable
from typing import Any

NUMBER_OR_NAME = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null")
SCALAR_CHARACTERS = frozenset("+-.0123456789eEaflnrstu")
SPACE = frozenset(" \t\r\n")
ESCAPES = frozenset('"\\/bfnrt')
HEX_DIGITS = frozenset("0123456789abcdefABCDEF")


def strict_json(text: str) -> Any:
    """The value that a whole text is; ValueError or RecursionError if it is no JSON, as NaN is none."""
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


class NotJson(Exception):  # noqa: N818 - nobody's error: most text is not JSON
    """The characters so far are the beginning of no JSON object."""


class JsonObject:
    """Takes a JSON object from its "{" on; `members` has the text of each value by the text of its key.

    A loop over a stack, so depth costs no recursion.
    """

    def __init__(self) -> None:
        self.members: dict[str, str] = {}
        self.first_key: str | None = None  # known before its value is
        self._text: list[str] = []
        self._closers: list[str] = []
        self._state: Callable[[str], None] = self._start
        self._after_string: Callable[[], None] = self._end_of_value
        self._scalar = ""
        self._digits = 0
        self._key = ""
        self._begin = 0  # of the outermost key or value that is being read

    @property
    def text(self) -> str:
        return "".join(self._text)

    def push(self, char: str) -> bool:
        """Take one character, "" for the end of the text; True if it closes the object. NotJson if it does not fit."""
        self._text.append(char)
        self._state(char)
        return not self._closers

    def _start(self, char: str) -> None:
        if char != "{":
            raise NotJson
        self._open("}", self._first_key)

    def _open(self, closer: str, state: Callable[[str], None]) -> None:
        self._closers.append(closer)
        self._state = state

    def _close(self) -> None:
        self._closers.pop()
        self._end_of_value()

    def _end_of_value(self) -> None:
        if len(self._closers) == 1:
            self.members[self._key] = "".join(self._text[self._begin :])
        self._state = self._next

    def _first_key(self, char: str) -> None:
        if char == "}":
            self._close()
        else:
            self._before_key(char)

    def _before_key(self, char: str) -> None:
        if char in SPACE:
            return
        if char != '"':
            raise NotJson
        self._note_begin()
        self._after_string, self._state = self._end_of_key, self._in_string

    def _end_of_key(self) -> None:
        if len(self._closers) == 1:
            self._key = "".join(self._text[self._begin + 1 : -1])
            self.first_key = self._key if self.first_key is None else self.first_key
        self._state = self._colon

    def _colon(self, char: str) -> None:
        if char == ":":
            self._state = self._value
        elif char not in SPACE:
            raise NotJson

    def _first_item(self, char: str) -> None:
        if char == "]":
            self._close()
        else:
            self._value(char)

    def _value(self, char: str) -> None:
        if char in SPACE:
            return
        self._note_begin()
        if char == "{":
            self._open("}", self._first_key)
        elif char == "[":
            self._open("]", self._first_item)
        elif char == '"':
            self._after_string, self._state = self._end_of_value, self._in_string
        elif char in SCALAR_CHARACTERS:
            self._scalar, self._state = char, self._in_scalar
        else:
            raise NotJson

    def _note_begin(self) -> None:
        if len(self._closers) == 1:
            self._begin = len(self._text) - 1

    def _in_scalar(self, char: str) -> None:
        if char in SCALAR_CHARACTERS:
            self._scalar += char
            return
        if not NUMBER_OR_NAME.fullmatch(self._scalar):
            raise NotJson
        # Its end is seen by the character behind it, which is none of the value.
        behind = self._text.pop()
        self._end_of_value()
        self._text.append(behind)
        self._next(char)

    def _in_string(self, char: str) -> None:
        if char == '"':
            self._after_string()
        elif char == "\\":
            self._state = self._escape
        elif char < " ":
            raise NotJson

    def _escape(self, char: str) -> None:
        if char == "u":
            self._digits, self._state = 4, self._in_hex
        elif char in ESCAPES:
            self._state = self._in_string
        else:
            raise NotJson

    def _in_hex(self, char: str) -> None:
        if char not in HEX_DIGITS:
            raise NotJson
        self._digits -= 1
        if self._digits == 0:
            self._state = self._in_string

    def _next(self, char: str) -> None:
        closer = self._closers[-1]
        if char == ",":
            self._state = self._before_key if closer == "}" else self._value
        elif char == closer:
            self._close()
        elif char not in SPACE:
            raise NotJson
