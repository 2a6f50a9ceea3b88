"""Progress and numbers for people, on standard error; silent where nobody watches."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


def watched(quiet: bool) -> bool:
    """Whether a person sees standard error."""
    return not quiet and sys.stderr.isatty()


def load_progress(
    is_root: bool, quiet: bool, label: str = "loading rank 0's slices"
) -> Callable[[int], AbstractContextManager[Callable[[int], None]]]:
    """Return what opens a bar over a number of bytes on rank 0's terminal, with GB/s."""

    @contextmanager
    def silent(total: int) -> Iterator[Callable[[int], None]]:
        yield lambda count: None

    @contextmanager
    def bar(total: int) -> Iterator[Callable[[int], None]]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=total)
            yield lambda count: progress.advance(task, count)

    return bar if is_root and watched(quiet) else silent


@contextmanager
def steps_progress(label: str, total: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """Show a bar over a number of equal steps on a terminal; gives the function that is told of each."""
    if not watched(quiet):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def in_units(count: float) -> str:
    """A number of bytes as people read it: 1.5 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
