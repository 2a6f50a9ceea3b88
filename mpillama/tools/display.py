"""Progress and numbers for people, on standard error; silent where nobody watches."""

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from mpillama.engine.load_watch import LoadState

LAUNCHERS = ("mpirun", "mpiexec", "prterun", "orterun")


def watched(quiet: bool) -> bool:
    """Whether a person sees standard error."""
    return not quiet and bool(sys.stderr.isatty() or _launchers_terminal())


def _launchers_terminal() -> str:
    """The terminal that mpirun passes standard error on to, if it runs on this host; "" for none."""
    import psutil

    if not stat.S_ISFIFO(os.fstat(2).st_mode) and not stat.S_ISSOCK(os.fstat(2).st_mode):
        return ""  # to a file of this rank's own
    try:
        launcher = next((p for p in psutil.Process().parents() if p.name().startswith(LAUNCHERS)), None)
        shown = os.readlink(f"/proc/{launcher.pid}/fd/2") if launcher else ""  # noqa: PTH115 - no file of ours
    except (OSError, psutil.Error):
        return ""
    return shown if shown.startswith(("/dev/pts/", "/dev/tty")) else ""


def terminal_console() -> "Console":
    """Standard error with the size of the terminal that it comes to."""
    from rich.console import Console

    name = "" if sys.stderr.isatty() else _launchers_terminal()
    if not name:
        return Console(stderr=True)
    try:
        terminal = os.open(name, os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return Console(stderr=True, force_terminal=True)
    try:
        return Console(stderr=True, force_terminal=True, width=os.get_terminal_size(terminal).columns or None)
    finally:
        os.close(terminal)


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


def load_progress(is_root: bool, quiet: bool) -> Callable[[int], AbstractContextManager[Callable[["LoadState"], None]]]:
    """Return what opens a bar over the bytes of all ranks on rank 0's terminal, with GB/s and the slowest rank."""

    @contextmanager
    def bar(total: int) -> Iterator[Callable[["LoadState"], None]]:
        with _bytes_bar("loading") as progress:
            task = progress.add_task("", total=total, note="")

            def show(state: "LoadState") -> None:
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
