"""Answers of gpt-oss: messages in channels, which are thoughts, what is said, or calls of tools.

An answer is `<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>`; a call
names its function in the head of a message: `<|channel|>commentary to=functions.NAME<|message|>{…}<|call|>`. The marks
are tokens, whatever the text between them spells.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from mpillama.openai.reasoning import Part, PartParser
from mpillama.openai.tool_calls import ToolFormat
from mpillama.openai.tool_grammars import Function, TokenId, call_rules, marker_rule, schema_rule
from mpillama.openai.tool_readers import Call, NoCall, Reader
from mpillama.text.constraint import text_rule

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
CALL, RETURN, CONSTRAIN = "<|call|>", "<|return|>", "<|constrain|>"
MARKS = (START, CHANNEL, MESSAGE, END, CALL, RETURN, CONSTRAIN)
PREFIX = "functions."
RECIPIENT = re.compile(r"\bto=(\S+)")
THOUGHT = "analysis"
MOST_HEAD = 512
"""Characters of a message's head at the most; longer text is the answer of a model that does not know channels."""


def is_harmony(template_source: str) -> bool:
    """Whether a chat template writes channels."""
    return CHANNEL in template_source and MESSAGE in template_source


@dataclass(frozen=True)
class HarmonyFormat:
    """The marks by their ids."""

    ids: dict[int, str]

    @property
    def marking(self) -> frozenset[int]:
        return frozenset(self.ids)

    def parser_after(self, prompt_end: str, begun: str) -> "HarmonyParser":
        """Start to read an answer: in the head of a message, or in the text of one that is continued."""
        _, message, text = prompt_end.rpartition(MESSAGE)
        is_open = bool(message) and not any(mark in text for mark in MARKS)
        thinks = is_open and prompt_end.rpartition(CHANNEL)[2].startswith(THOUGHT)
        return HarmonyParser(self, is_open, thinks)


def harmony_format(token_id: Callable[[str], int | None]) -> HarmonyFormat | None:
    """The format of a vocabulary that has the marks; None of another."""
    found = {token_id(mark): mark for mark in MARKS}
    known = {number: mark for number, mark in found.items() if number is not None}
    return HarmonyFormat(known) if {CHANNEL, MESSAGE, END} <= set(known.values()) else None


class _State(Enum):
    HEAD = auto()
    THINKING = auto()
    SAYING = auto()
    CALLING = auto()


class HarmonyParser(PartParser):
    """Divides a streamed answer into thoughts, what is said, and calls, wherever its pieces are cut.

    A call is given out when it is whole. Text outside of any message, which no model of this kind writes, is said.
    """

    def __init__(self, form: HarmonyFormat, is_open: bool, thinks: bool) -> None:
        super().__init__()
        self._form = form
        self._state = _State.THINKING if thinks else _State.SAYING if is_open else _State.HEAD
        self._from = 0  # the first token of the thought
        self._before = 0  # tokens of thoughts before it
        self._head = ""  # of a message, with a space for each mark
        self._channel: int | None = None  # where it names the channel
        self._name = ""
        self._held: list[str] = []  # of a call

    def _advance(self, ended: bool) -> list[Part]:
        parts: list[Part] = []
        while self._marks and self._marks[0].end <= self._at + len(self._text):
            mark = self._marks.pop(0)
            parts += self._add(self._take(max(0, mark.start - self._at)))
            self._take(mark.end - self._at)
            parts += self._meet(self._form.ids[mark.token], mark.index)
        until = self._marks[0].start - self._at if self._marks else len(self._text)
        parts += self._add(self._take(max(0, until)))
        if self._state is _State.THINKING:
            self.tokens = self._before + max(0, self._count - self._from)
        if ended:
            parts += self._end()
        return [part for part in parts if part.text or part.call]

    def _end(self) -> list[Part]:
        parts = self._add(self._take(len(self._text)))
        if self._state is _State.CALLING:
            parts += self._end_of_call()
        elif self._state is _State.HEAD and self._channel is None:
            parts.append(Part(self._head.strip()))
        self._head = ""
        return parts

    def _add(self, text: str) -> list[Part]:
        """Text between two marks."""
        if self._state is _State.THINKING:
            return [Part(text, is_thought=True)]
        if self._state is _State.SAYING:
            return [Part(text)]
        if self._state is _State.CALLING:
            self._held.append(text)
            return []
        self._head += text
        if self._channel is not None or _may_be_head(self._head):
            return []
        said, self._head, self._state = self._head, "", _State.SAYING
        return [Part(said)]

    def _meet(self, mark: str, index: int) -> list[Part]:
        """Go on behind a mark."""
        parts = self._end_of_call() if self._state is _State.CALLING else []
        if self._state is _State.THINKING:
            self._before += max(0, index - self._from)
            self.tokens = self._before
        if mark == MESSAGE:
            self._begin(index + 1)
        else:
            if self._state is not _State.HEAD or mark == START:
                self._state, self._head, self._channel = _State.HEAD, "", None
            self._head += " "
            if mark == CHANNEL:
                self._channel = len(self._head)
        return parts

    def _begin(self, first_token: int) -> None:
        """Begin a message's text, of which the head tells what it is."""
        recipient = RECIPIENT.search(self._head)
        channel = self._head[self._channel :].split()[:1] if self._channel is not None else []
        self._head, self._channel, self._from, self._held = "", None, first_token, []
        self._name = recipient[1].removeprefix(PREFIX) if recipient else ""
        if recipient:
            self._state = _State.CALLING
        else:
            self._state = _State.THINKING if channel == [THOUGHT] else _State.SAYING

    def _end_of_call(self) -> list[Part]:
        text, self._held, self._state = "".join(self._held), [], _State.HEAD
        return [Part("", call=Call(self._name, text.strip() or "{}"))]


def _may_be_head(text: str) -> bool:
    """Whether a message's head may begin so, before it has named its channel: a role, or whom it is for."""
    word = text.lstrip()
    return len(text) < MOST_HEAD and (
        "to=".startswith(word) or word.startswith("to=") or "assistant".startswith(word) or word.startswith("assistant")
    )


def read_nothing() -> Reader:
    """Calls stand in messages of their own, so no text is one."""
    yield
    raise NoCall


def harmony_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """One call: the model's turn ends with it."""
    channel, constrain, message = (marker_rule(mark, token_id) for mark in (CHANNEL, CONSTRAIN, MESSAGE))
    rules = (
        f"{text_rule(f'commentary to={PREFIX}{function.name} ')} {constrain} {text_rule('json')} {message} "
        f"{schema_rule(function, function.parameters)}"
        for function in functions
    )
    return f"start: {channel} call\n" + call_rules(rules)


HARMONY = ToolFormat("harmony", CHANNEL, "", read_nothing, harmony_rules, one_text=True)
