"""A program on a terminal of its own, as a person has it: what is typed is echoed, Ctrl-C is a signal."""

import fcntl
import os
import pty
import select
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.system.mpi.launch import TIMEOUT, Launch, started

CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """The person's side of the terminal."""

    def __init__(self, launch: Launch, side: int):
        self.launch = launch
        self.side = side
        self.shown = ""

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.side, text.encode())

    def expect(self, text: str, timeout: float = TIMEOUT) -> str:
        """Wait until `text` is shown after what was expected before; AssertionError if it does not come in time."""
        end = time.monotonic() + timeout
        while text not in self.shown:
            left = end - time.monotonic()
            assert left > 0, f"{text!r} did not come, but {self.shown!r}"
            if select.select([self.side], [], [], left)[0]:
                self.shown += self._read()
        before, _, self.shown = self.shown.partition(text)
        return before

    def _read(self) -> str:
        try:
            return os.read(self.side, 65536).decode(errors="replace")
        except OSError:  # the other side is closed
            raise AssertionError(f"the program ended after {self.shown!r}") from None

    def interrupt_key(self) -> bytes:
        """The character that is a signal at the moment: Ctrl-C, unless a program has changed it."""
        key = termios.tcgetattr(self.side)[6][termios.VINTR]
        assert isinstance(key, bytes)
        return key


def _take_terminal() -> None:
    """Make the standard input the terminal whose keys are signals for this session."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def on_terminal(ranks: int | None, *arguments: str | Path) -> Iterator[Terminal]:
    """Start Python with these arguments on a new terminal; it is killed at the end."""
    side, program_side = pty.openpty()
    streams = {"stdin": program_side, "stdout": program_side, "stderr": program_side}
    try:
        with started(ranks, *arguments, **streams, preexec_fn=_take_terminal) as launch:
            yield Terminal(launch, side)
    finally:
        os.close(side)
        os.close(program_side)
