"""The parts of an answer, and reasoning models: splits thoughts from the answer by the model family's marks.

A format makes a parser for each answer; the parser divides the answer into parts that are thought and parts that are
said. A family that names its parts in another way (channels, say) brings a format of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from mpillama.engine.answer import Mark
from mpillama.openai.tool_readers import Call

PAIRS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<mm:think>", "</mm:think>"))
"""What stands around a thought: DeepSeek-R1, Qwen and many after them; Magistral; MiniMax M3."""


@dataclass(frozen=True)
class Part:
    """A piece of an answer: thought, or said, or a call of a tool."""

    text: str
    is_thought: bool = False
    call: Call | None = None


class PartParser(ABC):
    """Divides a streamed answer into its parts, wherever its pieces are cut."""

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens of thoughts, without their marks."""
        self._marks: list[Mark] = []
        self._text = ""  # not given out yet
        self._at = 0  # where it begins in the answer
        self._count = 0  # tokens so far

    def push(self, text: str, tokens: int, marks: Sequence[Mark] = ()) -> list[Part]:
        """What `text` adds for certain; it came with so many `tokens`, among them `marks`."""
        self._text += text
        self._count += tokens
        self._marks += marks
        return self._advance(ended=False)

    def finish(self) -> list[Part]:
        """The rest, when the answer has ended."""
        return self._advance(ended=True)

    @abstractmethod
    def _advance(self, ended: bool) -> list[Part]:
        """Give out what is certain of the text at hand; all of it if the answer has `ended`."""

    def _take(self, count: int) -> str:
        taken, self._text = self._text[:count], self._text[count:]
        self._at += len(taken)
        return taken


class AnswerFormat(Protocol):
    """How a family marks the parts of its answers."""

    @property
    def marking(self) -> frozenset[int]:
        """The tokens whose places a parser must be told."""

    def parser_after(self, prompt_end: str, begun: str) -> PartParser:
        """Start to read the answer to a prompt that ends so; `begun` is the text of a message that it continues."""


@dataclass(frozen=True)
class ReasoningFormat:
    """How a family marks its thoughts.

    The marks are known by `open_id` and `close_id`, so that a mark that is only spelled is text; where the vocabulary
    has no such tokens (None) they are looked for in the text, and only where a mark must stand.
    """

    open: str
    close: str
    open_id: int | None = None
    close_id: int | None = None

    @property
    def by_id(self) -> bool:
        """Whether the marks are tokens."""
        return self.open_id is not None and self.close_id is not None

    @property
    def marking(self) -> frozenset[int]:
        return frozenset(i for i in (self.open_id, self.close_id) if i is not None) if self.by_id else frozenset()

    def opens(self, prompt_end: str) -> bool:
        """Whether a prompt that ends so has opened the thought: the answer then only has its end."""
        return prompt_end.rstrip().endswith(self.open)

    def is_open_in(self, text: str) -> bool:
        """Whether the beginning of an answer, which is to be continued, is a thought without an end."""
        return text.lstrip().startswith(self.open) and self.close not in text

    def parser(self, is_open: bool) -> "ThoughtParser":
        """Start to read an answer, in the midst of a thought if `is_open`."""
        return ThoughtParser(self, is_open)

    def parser_after(self, prompt_end: str, begun: str) -> "ThoughtParser":
        """Start to read the answer to a prompt that ends so; `begun` is the text of a message that it continues."""
        return self.parser(self.opens(prompt_end) or self.is_open_in(begun))


class _State(Enum):
    BEFORE = auto()
    THINKING = auto()
    SAYING = auto()


class ThoughtParser(PartParser):
    """Splits a streamed answer into thought and answer, wherever its pieces are cut.

    A thought is only what the answer begins with. White space around it is left out.
    """

    def __init__(self, form: ReasoningFormat, is_open: bool) -> None:
        super().__init__()
        self._form = form
        self._state = _State.THINKING if is_open else _State.BEFORE
        self._from = 0  # the thought's first token
        self._trim = is_open  # whether white space is left out until something else comes

    def _advance(self, ended: bool) -> list[Part]:
        parts: list[Part] = []
        step = {_State.BEFORE: self._begin, _State.THINKING: self._think, _State.SAYING: self._say}
        while (state := self._state) and step[state](parts, ended) and self._state is not state:
            pass
        if self._state is _State.THINKING:
            self.tokens = max(0, self._count - self._from)
        return [part for part in parts if part.text]

    def _begin(self, parts: list[Part], ended: bool) -> bool:
        """Whether it is known if the answer begins with a thought."""
        said = self._text.lstrip()
        space = len(self._text) - len(said)
        if self._form.by_id:
            mark = self._next_mark(self._form.open_id)
            if mark is not None and mark.start <= self._at + space and mark.end <= self._at + len(self._text):
                self._open(mark.end - self._at, mark.index + 1)
                return True
            is_certain = bool(said) and not (mark and mark.start <= self._at + space)
        else:
            if said.startswith(self._form.open):
                self._open(space + len(self._form.open), self._count)
                return True
            is_certain = not self._form.open.startswith(said)
        if is_certain or ended:
            self._state = _State.SAYING
        return is_certain or ended

    def _open(self, skip: int, first_token: int) -> None:
        self._take(skip)
        self._state, self._trim, self._from = _State.THINKING, True, first_token

    def _think(self, parts: list[Part], ended: bool) -> bool:
        """Give out the thought up to its end; whether that has come."""
        found = self._close()
        if found is not None:
            start, end, last = found
            parts.append(Part(self._trimmed(self._take(start)).rstrip(), True))
            self._take(end - start)
            self.tokens = max(0, last - self._from)
            self._state, self._trim = _State.SAYING, True
            return True
        text = self._text if ended else self._text[: self._safe()].rstrip()
        parts.append(Part(self._trimmed(self._take(len(text))), True))
        return False

    def _close(self) -> tuple[int, int, int] | None:
        """Where the mark that ends the thought is in the text at hand, and its number; None if it has not come."""
        if not self._form.by_id:
            start = self._text.find(self._form.close)
            return None if start < 0 else (start, start + len(self._form.close), self._count)
        mark = self._next_mark(self._form.close_id)
        if mark is None or mark.end > self._at + len(self._text):
            return None
        return max(0, mark.start - self._at), mark.end - self._at, mark.index

    def _safe(self) -> int:
        """Characters of the text at hand that belong to the thought for certain."""
        if self._form.by_id:
            mark = self._next_mark(self._form.close_id)
            return len(self._text) if mark is None else max(0, mark.start - self._at)
        close = self._form.close
        sizes = range(min(len(close), len(self._text)), 0, -1)
        return len(self._text) - next((size for size in sizes if close.startswith(self._text[-size:])), 0)

    def _say(self, parts: list[Part], ended: bool) -> bool:
        parts.append(Part(self._trimmed(self._take(len(self._text)))))
        return False

    def _next_mark(self, token: int | None) -> Mark | None:
        return next((m for m in self._marks if m.token == token and m.start >= self._at), None)

    def _trimmed(self, text: str) -> str:
        if not self._trim:
            return text
        text = text.lstrip()
        self._trim = not text
        return text
