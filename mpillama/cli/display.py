"""Progress for people, on standard error; silent where nobody watches."""

import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import psutil
from psutil import Process

from mpillama.comm.failure import print_error

STANDARD_INPUT, STANDARD_OUTPUT, STANDARD_ERROR = 0, 1, 2
LAUNCHERS = ("mpirun", "mpiexec", "prterun", "orterun")
DAEMONS = ("orted", "prted")
"""Open MPI's processes on other hosts: they make terminals for their ranks, whatever mpirun's own output is."""

LONG_CELL = 24
"""Longer texts in a table may be broken between words."""


def is_terminal(output: int) -> bool:
    """Whether a person is at the other end of this file descriptor."""
    return bool(terminal_of(output))


def terminal_of(output: int) -> str:
    """The terminal that an output comes to (or the input from), perhaps by way of mpirun on this host; "" for none."""
    is_tty, mode = os.isatty(output), os.fstat(output).st_mode
    if not (is_tty or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return ""  # a file
    own = os.ttyname(output) if is_tty else ""
    if is_tty and "PMIX_RANK" not in os.environ:
        return own  # else it may be one that Open MPI made, whatever mpirun's own output is
    ancestors = _launcher_and_between()
    if not ancestors:
        return own
    if ancestors[-1].name().startswith(DAEMONS) or (stat.S_ISFIFO(mode) and not _is_read_by(ancestors, output)):
        return ""
    shown = _link(ancestors[-1].pid, output)
    return shown if shown.startswith(("/dev/pts/", "/dev/tty")) else ""


def _launcher_and_between() -> list[Process]:
    """This process's ancestors up to the launcher; none without one on this host."""
    found = []
    try:
        for process in psutil.Process().parents():
            found.append(process)
            if process.name().startswith((*LAUNCHERS, *DAEMONS)):
                return found
    except psutil.Error:
        return []
    return []


def _is_read_by(processes: list[Process], pipe: int) -> bool:
    """Whether one of them is at the other end of a pipe of this process; else it leads to another program."""
    mine = _link(os.getpid(), pipe)
    return any(_link(p.pid, int(fd)) == mine for p in processes for fd in _descriptors(p.pid))


def _descriptors(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/fd")  # noqa: PTH208 - the system's, not a path of ours
    except OSError:
        return []  # another user's, or gone


def _link(pid: int, descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{descriptor}")  # noqa: PTH115 - as above
    except OSError:
        return ""


def console(output: int) -> Any:
    """A rich console as wide as the terminal."""
    from rich.console import Console

    return Console(stderr=output == STANDARD_ERROR, force_terminal=True, width=_columns(terminal_of(output)))


def _columns(name: str) -> int | None:
    """The width of a terminal, None if unknown."""
    try:
        terminal = os.open(name, os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return None
    try:
        return os.get_terminal_size(terminal).columns or None
    finally:
        os.close(terminal)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, perhaps without a header: plain lines in full width, but on a terminal one that fits its width."""
    if not is_terminal(STANDARD_OUTPUT):
        _print_plain([header, *rows] if header else rows)
        return
    from rich.table import Table
    from rich.text import Text

    screen = console(STANDARD_OUTPUT)
    widths = [
        max(_least_width(name, 0), *(_least_width(cell, LONG_CELL) for cell in cells))
        for name, *cells in zip(header or [""] * len(rows[0]), *rows, strict=True)
    ]
    spare = screen.width - sum(widths)
    if header and spare < len(widths) - 1:
        _print_folded([header, *rows])
        return
    table = Table(show_header=bool(header))
    if not header or spare < 3 * len(widths) + 1:
        gap = 2 if not header or spare >= 2 * (len(widths) - 1) else 1
        table.box, table.padding, table.pad_edge = None, (0, gap, 0, 0), False
    for name, width in zip(header or [""] * len(widths), widths, strict=True):
        table.add_column(name, min_width=width if header else None)
    for row in rows:
        table.add_row(*map(Text, row))
    screen.print(table)


def _least_width(text: str, kept_whole: int) -> int:
    """Columns that a text needs if it is broken between words; one of up to `kept_whole` characters is not."""
    return len(text) if len(text) <= kept_whole else max(map(len, text.split()), default=0)


def _print_plain(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _print_folded(rows: Sequence[Sequence[str]]) -> None:
    """Print rows that are too wide: the first cell, and the others in columns below it."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (cell.ljust(width) for cell, width in zip(others, widths[1:], strict=True))
        sys.stdout.write(f"{first}\n  {'  '.join(cells).rstrip()}\n")


def print_sentence(text: str) -> None:
    """Print a line on standard output, broken between words on a terminal only."""
    if is_terminal(STANDARD_OUTPUT):
        console(STANDARD_OUTPUT).print(text, markup=False, highlight=False)
    else:
        sys.stdout.write(text + "\n")


Display = Callable[[str], AbstractContextManager[Callable[[str], None]]]
"""Tells a person, as long as it is open, what takes long; gives the function that is told how far it is."""
PATIENCE = 0.5
"""Seconds that something may take on a terminal before its line appears."""
LONG = 20.0
"""Seconds after which it is told, once, where standard error is no terminal."""


def watched(quiet: bool) -> bool:
    return not quiet and is_terminal(STANDARD_ERROR)


def stages(is_root: bool, quiet: bool) -> Display:
    """Return a display for long operations: a line with the elapsed seconds on rank 0's terminal, else one sentence."""
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
    with Progress(*columns, console=console(STANDARD_ERROR), transient=True, refresh_per_second=2) as progress:
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


def _bytes_bar(label: str) -> Any:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console(STANDARD_ERROR), transient=True)


@contextmanager
def steps_progress(label: str, total: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """Show a bar over a number of equal steps on a terminal; gives the function that is told of each."""
    if not watched(quiet):
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console(STANDARD_ERROR), transient=True) as progress:
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
