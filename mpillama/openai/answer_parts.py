"""What an answer is divided into, and what every format of answers has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mpillama.engine.answer import Mark
from mpillama.openai.tool_readers import Call


@dataclass(frozen=True)
class Part:
    """A piece of an answer: thought, or said, or a call of a tool."""

    text: str
    is_thought: bool = False
    call: Call | None = None


class PartParser(Protocol):
    """Divides a streamed answer into its parts, wherever its pieces are cut."""

    tokens: int
    """Tokens of the thought, without its marks."""

    def push(self, text: str, tokens: int, marks: Sequence[Mark] = ()) -> list[Part]:
        """What `text` adds for certain; it came with so many `tokens`, among them `marks`."""

    def finish(self) -> list[Part]:
        """The rest, when the answer has ended."""


class AnswerFormat(Protocol):
    """How a family marks the parts of its answers."""

    @property
    def marking(self) -> frozenset[int]:
        """The tokens whose places a parser must be told."""

    def parser_after(self, prompt_end: str, begun: str) -> PartParser:
        """Start to read the answer to a prompt that ends so; `begun` is the text of a message that it continues."""
