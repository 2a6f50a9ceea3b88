"""Progress for people, on standard error; silent where nobody watches."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mpillama.cli.terminal import STANDARD_ERROR, console, is_terminal
from mpillama.comm.failure import print_error

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


Display = Callable[[str], AbstractContextManager[Callable[[str], None]]]
"""Tells a person, as long as it is open, what takes long; gives the function that is told how far it is."""
PATIENCE = 0.5
"""Seconds that something may take on a terminal before its line appears."""
LONG = 20.0
"""Seconds after which it is told, once, where standard error is no terminal."""


def watched(quiet: bool) -> bool:
    return not quiet and is_terminal(STANDARD_ERROR)


def terminal_console() -> "Console":
    """Standard error with the size of the terminal that it comes to."""
    return console(STANDARD_ERROR)


def stages(is_root: bool, quiet: bool) -> Display:
    """Return what tells of things that take long: a line with their seconds on rank 0's terminal, else one sentence."""
    if quiet or not is_root:
        return lambda what: nullcontext(lambda how_far: None)

    @contextmanager
    def display(what: str) -> Iterator[Callable[[str], None]]:
        ended, notes = threading.Event(), [""]
        tell = _show_line if watched(quiet) else _say_once
        telling = threading.Thread(target=tell, args=(what, notes, ended), daemon=True, name="display")
        telling.start()
        try:
            yield lambda how_far: notes.__setitem__(0, how_far)
        finally:
            ended.set()
            telling.join()

    return display


def _show_line(what: str, notes: list[str], ended: threading.Event) -> None:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if ended.wait(PATIENCE):
        return
    columns = SpinnerColumn(), TextColumn(what), TextColumn("{task.fields[note]}"), TimeElapsedColumn()
    # Drawn seldom: what is told of may be being measured.
    with Progress(*columns, console=terminal_console(), transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("", total=None, note=notes[0])
        while not ended.wait(PATIENCE):
            progress.update(task, note=notes[0])


def _say_once(what: str, notes: list[str], ended: threading.Event) -> None:
    if not ended.wait(LONG):
        print_error(f"mpillama: {what} …")


def bytes_progress(
    is_root: bool, quiet: bool, label: str
) -> Callable[[int], AbstractContextManager[Callable[[int], None]]]:
    """Return what opens a bar over a number of bytes on rank 0's terminal, with GB/s."""

    @contextmanager
    def bar(total: int) -> Iterator[Callable[[int], None]]:
        with _bytes_bar(label) as progress:
            task = progress.add_task("", total=total, note="")
            yield lambda count: progress.advance(task, count)

    return bar if is_root and watched(quiet) else _silent


class LoadState(Protocol):
    """How far all ranks are: bytes read by each, their hosts, and the rank that is furthest behind."""

    @property
    def read(self) -> np.ndarray: ...
    @property
    def hosts(self) -> Sequence[str]: ...
    @property
    def slowest(self) -> str: ...


def load_progress(
    is_root: bool, quiet: bool, label: str = "loading"
) -> Callable[[int], AbstractContextManager[Callable[[LoadState], None]]]:
    """Return what opens a bar over the bytes of all ranks on rank 0's terminal, with GB/s and the slowest rank."""

    @contextmanager
    def bar(total: int) -> Iterator[Callable[[LoadState], None]]:
        with _bytes_bar(label) as progress:
            task = progress.add_task("", total=total, note="")

            def show(state: LoadState) -> None:
                note = f"slowest: {state.slowest}" if len(state.hosts) > 1 else ""
                progress.update(task, completed=min(int(state.read.sum()), total), note=note)

            yield show

    return bar if is_root and watched(quiet) else _silent


@contextmanager
def _silent(total: int) -> Iterator[Callable[[object], None]]:
    yield lambda news: None


def _bytes_bar(label: str) -> "Progress":
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=terminal_console(), transient=True)


@contextmanager
def steps_progress(label: str, total: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """Show a bar over a number of equal steps on a terminal; gives the function that is told of each."""
    if not watched(quiet):
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=terminal_console(), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def in_units(count: float) -> str:
    """A number of bytes as people read it: 1.5 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def in_number(count: int, noun: str) -> str:
    """A number of things: 1 rank, 2 ranks."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
