"""Run the program with reads that are slow or fail: reading_faults.py KIND RANK DIRECTORY [program's arguments].

Each rank that ends by itself leaves its status as a file in DIRECTORY, a failure in mid-step its time.
"""

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpillama.__main__ import main
from mpillama.comm.launcher import launched_rank
from mpillama.formats import reading
from mpillama.job import monitor
from mpillama.kernels import target

SLOW_STEP = 0.02


def after_prepare(patch: Callable[[], None]) -> None:
    """Patch once the kernels' target is prepared: then the ranks have met."""
    prepare = target.prepare

    def prepare_and_patch(*arguments: Any) -> Any:
        found = prepare(*arguments)
        patch()
        return found

    target.prepare = prepare_and_patch


def slow() -> None:
    """Make each step of the model last long enough to be interrupted."""
    from mpillama.models.decoder import Decoder

    forward = Decoder.advance

    def sleep_and_forward(self: Decoder, *arguments: Any) -> Any:
        time.sleep(SLOW_STEP)
        return forward(self, *arguments)

    Decoder.advance = sleep_and_forward


def with_open(opened: Callable[[str], int]) -> Callable[[], None]:
    """Open something else than the model file for reading weights."""

    def patch() -> None:
        reading.open_for_reading = opened

    return patch


def input_error(path: str) -> int:
    """A file of the right size whose bytes cannot be read."""
    size = Path(path).stat().st_size
    copy = Path(sys.argv[3]) / "unreadable.h5"
    with copy.open("wb") as file:
        file.truncate(size)
    return os.open(copy, os.O_WRONLY)


def patched_reads(before: Callable[[], None]) -> Callable[[], None]:
    """Do something before each read of weights."""

    def patch() -> None:
        from mpillama.loading import load as loading

        preadv, load_weights = os.preadv, loading.load_weights

        def read(*arguments: Any) -> int:
            before()
            return preadv(*arguments)

        def load(*arguments: Any) -> Any:
            os.preadv = read
            return load_weights(*arguments)

        loading.load_weights = load

    return lambda: after_prepare(patch)


def slow_read() -> None:
    time.sleep(SLOW_READ)


def fail_on_culprit() -> None:
    """One rank fails at its first read, while the others still have much to do."""
    if launched_rank() != int(os.environ["CULPRIT"]):
        time.sleep(2)
        return
    failed = Path(sys.argv[3]) / "failed"
    if not failed.exists():
        failed.write_text(str(time.time()))
    raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))


def flaky() -> None:
    """The first two reads fail in a way that may pass."""
    FLAWS.append(None)
    if len(FLAWS) <= 2:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def rewrite() -> None:
    """Somebody writes the file while it is read."""
    os.utime(sys.argv[5], ns=(0, 0))


def low_memory() -> None:
    """The host runs out of memory once a file says so, in the midst of slow steps."""
    after_prepare(slow)
    available, sign = monitor.available_bytes, Path(sys.argv[3]) / "low"
    monitor.available_bytes = lambda: 1 if sign.exists() else available()


FLAWS: list[None] = []
SLOW_READ = 0.4

KINDS: dict[str, Callable[[], None]] = {
    "slow": lambda: after_prepare(slow),
    "slow_read": patched_reads(slow_read),
    "fail_on_culprit": patched_reads(fail_on_culprit),
    "flaky": patched_reads(flaky),
    "rewrite": patched_reads(rewrite),
    "low_memory": low_memory,
    "input_error": with_open(input_error),
}

if __name__ == "__main__":
    kind, rank, directory = sys.argv[1:4]
    if rank == "all" or launched_rank() == int(rank):
        KINDS[kind]()
    status = main(sys.argv[4:])
    (Path(directory) / f"status-{launched_rank()}").write_text(str(status))
    sys.exit(status)
