"""Lines and Ctrl-C from the person at rank 0, with or without a launcher in between.

A launcher takes Ctrl-C itself: MPICH's passes the first one on and ends the job at the second. So while a chat runs
under a launcher on the person's own machine, the terminal is told to send Ctrl-C as an ordinary character that ends a
line; the launcher forwards it like any input.

A thread reads, also without a launcher, and the main one looks up now and then while it waits for a line: Python runs
no signal's handler in a wait that began just after the signal came, as one of input() may.
"""

import os
import queue
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType

import psutil

from mpillama.cli.display import STANDARD_INPUT, STANDARD_OUTPUT, is_terminal

CTRL_C = b"\x03"
LOOK_SECONDS = 0.2
LEAVE_SECONDS = 1.0
"""Two Ctrl-C within this time leave the program even if it answers nothing."""


class Keyboard:
    """Reads lines; `interrupted` tells of a Ctrl-C since the last line was asked for."""

    def __init__(self) -> None:
        self.interrupted = False
        self.asking = False
        self.last_interrupt = 0.0
        self.is_person = is_terminal(STANDARD_INPUT) and is_terminal(STANDARD_OUTPUT)
        """Whether somebody types and reads, perhaps by way of a launcher; a pipe needs no prompts."""
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # a signal's handler may put while get waits
        self._wanted, self._is_reading = threading.Semaphore(0), False

    @contextmanager
    def listening(self) -> Iterator["Keyboard"]:
        """Listen until the block ends; the terminal is then as it was before."""
        signal.signal(signal.SIGINT, self._on_signal)
        with nullcontext() if sys.stdin.isatty() else _ctrl_c_as_character():
            threading.Thread(target=self._read, daemon=True).start()
            yield self

    def line(self, prompt: str) -> str | None:
        """Ask for a line, with a prompt for a person: None at the end of input, "" after a Ctrl-C."""
        self.interrupted, self.asking = False, True
        try:
            if self.is_person:
                sys.stdout.write(prompt)
                sys.stdout.flush()
            text = self._next()
            sys.stdout.write("\n" if self.interrupted else "")
            return text
        finally:
            self.asking = False

    def _next(self) -> str | None:
        while True:
            if self.lines.empty() and not self._is_reading:
                self._is_reading = True
                self._wanted.release()
            with suppress(queue.Empty):
                return self.lines.get(timeout=LOOK_SECONDS)

    def tell(self, text: str) -> None:
        """Print a line for whoever types.

        On a terminal it goes where the prompts go: a launcher forwards the two outputs in any order.
        """
        stream = sys.stdout if is_terminal(STANDARD_OUTPUT) else sys.stderr
        stream.write(text + "\n")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._note_interrupt()

    def _note_interrupt(self) -> None:
        now = time.monotonic()
        if now - self.last_interrupt < LEAVE_SECONDS and self.interrupted and not self.asking:
            os._exit(128 + signal.SIGINT)  # the main thread may be stuck; the launcher ends the other ranks
        self.interrupted, self.last_interrupt = True, now
        if self.is_person:
            self._forget_lines()
        if self.asking:
            self.lines.put("")

    def _forget_lines(self) -> None:
        """What was typed ahead, as a terminal forgets it at Ctrl-C."""
        ended = False
        with suppress(queue.Empty):
            while True:
                ended |= self.lines.get_nowait() is None
        if ended:
            self.lines.put(None)

    def _read(self) -> None:
        """Cut the input into lines and a launcher's Ctrl-C; runs in its own thread."""
        rest = b""
        while data := self._some():
            for byte in (data[i : i + 1] for i in range(len(data))):
                if byte == CTRL_C:
                    rest = b""
                    self._note_interrupt()
                elif byte == b"\n":
                    self.lines.put(rest.decode(errors="replace"))
                    rest = b""
                else:
                    rest += byte
        if rest:
            self.lines.put(rest.decode(errors="replace"))
        self.lines.put(None)

    def _some(self) -> bytes:
        """What comes next; of a terminal only if a line is wanted, since reading stops a job in the background."""
        if sys.stdin.isatty():
            self._wanted.acquire()
        try:
            return os.read(0, 65536)
        except OSError:  # the terminal is gone
            return b""
        finally:
            self._is_reading = False


GUARDIAN = """
import sys, termios
terminal = int(sys.argv[1])
before = termios.tcgetattr(terminal)
print("ready", flush=True)
sys.stdin.buffer.read()
termios.tcsetattr(terminal, termios.TCSANOW, before)
"""
"""Puts a terminal back when its parent ends in whatever way: even a killed process closes its pipes."""
LAUNCHERS = re.compile(r"(mpirun|mpiexec|orterun|prterun|prte|prted|srun|hydra|pmi)", re.IGNORECASE)


@contextmanager
def _ctrl_c_as_character() -> Iterator[None]:
    """Let the launcher's terminal, if it is on this machine, send Ctrl-C as a line end instead of a signal."""
    terminal = _launcher_terminal()
    if terminal is None:
        yield  # rank 0 is on another machine, or nobody is at a terminal: the launcher's signal must do
        return
    with _guarded(terminal):
        changed = termios.tcgetattr(terminal)
        changed[6][termios.VINTR], changed[6][termios.VEOL] = b"\x00", CTRL_C
        termios.tcsetattr(terminal, termios.TCSANOW, changed)
        yield


@contextmanager
def _guarded(terminal: int) -> Iterator[None]:
    """Restore the terminal afterwards, also if this process is killed: a small process of its own session does it."""
    guardian = subprocess.Popen(
        [sys.executable, "-I", "-c", GUARDIAN, str(terminal)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=(terminal,),
        env={},  # nothing of the launcher: it is no rank
        start_new_session=True,
    )
    assert guardian.stdin is not None
    assert guardian.stdout is not None
    guardian.stdout.readline()
    try:
        yield
    finally:
        guardian.stdin.close()
        guardian.wait()
        os.close(terminal)


def _launcher_terminal() -> int | None:
    """A descriptor of the terminal that the launcher has as its input, None if it has another input."""
    launcher = None
    for parent in psutil.Process().parents():
        if LAUNCHERS.search(parent.name()):
            launcher = parent
        elif launcher is not None:
            break
    if launcher is None:
        return None
    try:
        terminal = os.open(f"/proc/{launcher.pid}/fd/0", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return None  # not ours to look at, or no input
    if os.isatty(terminal):
        return terminal
    os.close(terminal)
    return None
