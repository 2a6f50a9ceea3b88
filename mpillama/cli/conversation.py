"""A conversation that somebody types, in `chat` and in `client`: commands, questions, and answers as they come."""

import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

from mpillama.cli.keyboard import Keyboard
from mpillama.errors import UserError

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /quit leaves; Ctrl-C stops an answer."
Message = dict[str, Any]


def write_at_once(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def beginning(system: str | None) -> list[Message]:
    """The messages of a conversation in which nothing was asked yet."""
    return [{"role": "system", "content": system}] if system else []


def system_of(messages: list[Message]) -> str | None:
    """The system message of a conversation, if it begins with one."""
    return messages[0]["content"] if messages and messages[0]["role"] == "system" else None


class Conversation:
    """The messages so far, and who answers them: `answer` gives the pieces of the next one, `write` prints a piece.

    `on_change` is told of the messages whenever they are others.
    """

    def __init__(
        self, answer: Callable[[list[Message]], Generator[str, None, None]], system: str | None,
        write: Callable[[str], object] = write_at_once,
        on_change: Callable[[list[Message]], None] = lambda messages: None,
    ):  # fmt: skip
        self._answer = answer
        self._write = write
        self._on_change = on_change
        self.messages = beginning(system)

    def reset(self, system: str | None) -> None:
        self._change(beginning(system))

    def _change(self, messages: list[Message]) -> None:
        self.messages = messages
        self._on_change(messages)

    @property
    def system(self) -> str | None:
        return system_of(self.messages)

    def ask(self, text: str, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Print the answer as it comes; stopping midway cancels it. A question that fails is forgotten."""
        asked, answer = [*self.messages, {"role": "user", "content": text}], ""
        with closing(self._answer(asked)) as pieces:
            for piece in pieces:
                self._write(piece)
                answer += piece
                if is_stopped():
                    sys.stdout.write(" (stopped)")
                    break
        sys.stdout.write("\n")
        self._change([*asked, {"role": "assistant", "content": answer}])


def converse(
    conversation: Conversation, keyboard: Keyboard, prompt: str, advice: str = "",
    waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:  # fmt: skip
    """Answer what is typed until the input ends; `advice` follows an error, `waiting` is entered for each line."""
    with keyboard.listening():
        while True:
            with waiting():
                line = keyboard.line(prompt)
            text = "/quit" if line is None else line.strip()
            if text == "/quit":
                return
            name, _, argument = text.partition(" ")
            if name == "/reset":
                conversation.reset(conversation.system)
            elif name == "/system" and argument:
                conversation.reset(argument)
            elif text.startswith("/"):
                keyboard.tell(HELP)
            elif text:
                try:
                    conversation.ask(text, lambda: keyboard.interrupted)
                except UserError as error:
                    keyboard.tell(f"mpillama: {error}{advice}")
