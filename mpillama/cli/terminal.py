"""Which output a person sees on a terminal, behind a launcher too; tables, which are plain text elsewhere."""

import os
import stat
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import psutil
from psutil import Process

if TYPE_CHECKING:
    from rich.console import Console

STANDARD_OUTPUT, STANDARD_ERROR = 1, 2
LAUNCHERS = ("mpirun", "mpiexec", "prterun", "orterun")
DAEMONS = ("orted", "prted")
"""Open MPI's processes on other hosts: they make terminals for their ranks, whatever mpirun's own output is."""

LONG_CELL = 24
"""Longer texts in a table may be broken between words."""


def is_terminal(output: int) -> bool:
    """Whether a person sees what is written to this file descriptor."""
    return bool(terminal_of(output))


def terminal_of(output: int) -> str:
    """The terminal that an output comes to, perhaps by way of mpirun on this host; "" for none."""
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


def console(output: int) -> "Console":
    """What rich prints with on a terminal, in its width."""
    from rich.console import Console

    return Console(stderr=output == STANDARD_ERROR, force_terminal=True, width=_columns(terminal_of(output)))


def _columns(name: str) -> int | None:
    """The width of a terminal, None if it cannot be told."""
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
