"""Tool calls: what a format of them is, calls parsed from answers, and messages as a template expects them."""

import hashlib
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpillama.openai.tool_grammars import Rules, TokenId, chosen_functions
from mpillama.openai.tool_json import strict_json
from mpillama.openai.tool_readers import Call, NoCall, Reader

SHORT_ID = "[a-zA-Z0-9]{9}"
"""The ids on which Mistral's templates insist."""


@dataclass(frozen=True)
class CallPiece:
    """A part of a call: the first of each index has id and name, and the arguments of all add up to a JSON object."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True)
class Delta:
    """What is new in an answer: content, or a piece of a call."""

    content: str = ""
    call: CallPiece | None = None

    def fields(self) -> dict[str, Any]:
        """The fields of OpenAI's `delta` (without the role)."""
        if self.call is None:
            return {"content": self.content}
        call = self.call
        function = {"name": call.name, "arguments": call.arguments}
        first = {"index": call.index, "id": call.id, "type": "function", "function": function}
        return {"tool_calls": [first if call.id else {"index": call.index, "function": {"arguments": call.arguments}}]}


def new_call_id() -> str:
    """An id that no other call has."""
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls."""

    name: str
    marker: str
    bare: str  # with which characters an answer may begin that is a call without the marker
    read: Callable[[], Reader]
    rules: Rules
    short_ids: bool = False  # whether the templates insist on ids of 9 letters and digits
    text_arguments: bool = False  # whether the template puts arguments together as text
    one_text: bool = False  # whether the template refuses content and thought beside calls

    def parser(self, new_id: Callable[[], str] = new_call_id, names: Collection[str] | None = None) -> "ToolCallParser":
        """Start to read an answer; calls of functions other than `names`, if given, are content.

        If `names` maps functions to the schemas of their parameters, these tell what arguments mean.
        """
        return ToolCallParser(self, new_id, names)

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        tool_choice: str | Mapping[str, Any],
        parallel: bool,
        token_id: TokenId,
    ) -> str | None:
        """A grammar of nothing but calls that fit `tools` if `tool_choice` demands a call, else None.

        `token_id` gives the id of a marker that is one token (`Grammars.token_id`). UserError names what is wrong.
        """
        functions = chosen_functions(tools, tool_choice)
        return self.rules(functions, parallel, token_id) if functions else None

    def for_template(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """`message` as this format's templates want it, see the function of this name; ids too, where they insist."""
        changed = dict(message) if self.text_arguments else for_template(message)
        if self.one_text and changed.get("tool_calls") and changed.get("reasoning_content"):
            changed["content"] = ""
        if not self.short_ids:
            return changed
        if changed.get("tool_calls"):
            changed["tool_calls"] = [_with_short_id(call, "id") for call in changed["tool_calls"]]
        return _with_short_id(changed, "tool_call_id")


class ToolCallParser:
    """Splits a streamed answer into content and calls, wherever its pieces are cut.

    A call is given out when it is whole, so what looks like a call and is none can be content, to the last character.
    White space directly before and after calls is left out.
    """

    def __init__(self, form: ToolFormat, new_id: Callable[[], str], names: Collection[str] | None) -> None:
        self._form = form
        self._new_id = new_id
        self._names = names
        self._reading: Reader | None = None
        self._held: list[str] = []  # what the reader was given
        self._space = ""  # white space that is content only if content follows
        self._untouched = True  # nothing but white space so far
        self._after_call = False
        self._count = 0
        self._content: list[str] = []
        self._found: list[Delta] = []

    def push(self, text: str) -> list[Delta]:
        """What `text` adds for certain."""
        waiting = list(reversed(text))
        while waiting:
            # What a reader gives back is looked at again, but for its first character.
            waiting += reversed(self._take(waiting.pop()))
        return self._drain()

    def take(self, call: Call) -> list[Delta]:
        """A call that stands beside the text; the arguments of an unknown function are content."""
        if self._is_unknown([call]):
            return self.push(call.arguments)
        self._add_calls([call])
        return self._drain()

    def finish(self) -> list[Delta]:
        """The rest, when the answer has ended."""
        while self._reading is not None:  # a reader that has taken the end may ask once more, and gives up then
            for char in self._read(""):
                self._add_content(char)
        if not self._after_call:
            self._content.append(self._space)
        self._space = ""
        return self._drain()

    def _take(self, char: str) -> list[str]:
        """Take one character; returns those that must be taken again."""
        if self._reading is None and not self._may_begin(char):
            self._add_content(char)
            return []
        if self._reading is None:
            self._reading, self._held = self._form.read(), []
            next(self._reading)
        self._held.append(char)
        refused = self._read(char)
        if refused:
            self._add_content(refused[0])
        return refused[1:]

    def _may_begin(self, char: str) -> bool:
        return char == self._form.marker[0] or (self._untouched and char in self._form.bare)

    def _read(self, char: str) -> list[str]:
        """Give a character to the reader; returns all that it held if that is no call."""
        assert self._reading is not None
        try:
            self._reading.send(char)
        except StopIteration as end:
            self._reading = None
            return self._held if self._is_unknown(end.value) else self._add_calls(end.value)
        except NoCall:
            self._reading = None
            return self._held
        return []

    def _is_unknown(self, calls: list[Call]) -> bool:
        return self._names is not None and any(call.name not in self._names for call in calls)

    def _add_calls(self, calls: list[Call]) -> list[str]:
        self._found = self._drain()
        for call in calls:
            call_id = call.id or self._new_id()
            schema = self._names.get(call.name) if isinstance(self._names, Mapping) else None
            self._found.append(Delta(call=CallPiece(self._count, call_id, call.name, call.typed(schema))))
            self._count += 1
        self._space, self._after_call, self._untouched = "", True, False
        return []

    def _add_content(self, char: str) -> None:
        if char.isspace():
            self._space += char
            return
        self._content += [char] if self._after_call else [self._space, char]
        self._space, self._after_call, self._untouched = "", False, False

    def _drain(self) -> list[Delta]:
        """What was found, in its order."""
        content = "".join(self._content)
        found = [*self._found, Delta(content)] if content else self._found
        self._content, self._found = [], []
        return found


def for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """`message` with the arguments of its calls as objects, which most templates expect, if they are valid ones."""
    changed = dict(message)
    if message.get("tool_calls"):
        changed["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
    return changed


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        value = strict_json(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return dict(call)
    return {**call, "function": {**function, "arguments": value}} if isinstance(value, dict) else dict(call)


def _with_short_id(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    """`fields` with an id of 9 characters, the same for the same id."""
    given = fields.get(key)
    if not isinstance(given, str) or re.fullmatch(SHORT_ID, given):
        return dict(fields)
    return {**fields, key: hashlib.blake2b(given.encode(errors="surrogatepass"), digest_size=5).hexdigest()[:9]}
