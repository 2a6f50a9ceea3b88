"""Exact reads at 64-bit offsets, from file systems that may fail for a moment."""

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from threading import Event, Lock
from typing import TypeVar

from mpillama.errors import UserError

T = TypeVar("T")

MAX_READ = 0x7FFF_F000
"""Bytes that Linux moves in one read call at the most (read(2))."""
PIECE_BYTES = 64 << 20
"""About as much is read at a time: large enough for the servers of a parallel file system."""
BORDER_BYTES = 1 << 20
"""Pieces meet at multiples of this in the file, where stripes and pages begin."""
PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds before each new try."""
PASSING = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT})
"""Errors that a network file system recovers from."""

Preadv = Callable[[int, Sequence[memoryview], int], int]


class ShortReadError(OSError):
    """The file ended before the bytes that were asked for."""


class ChangedFileError(OSError):
    """The file is not the one that was opened."""


class ReadStoppedError(Exception):
    """Nobody wants the bytes any more."""


def read_exactly(fd: int, buffer: memoryview, offset: int, limit: int = MAX_READ, preadv: Preadv | None = None) -> int:
    """Fill `buffer` (contiguous bytes) from `offset` of an open file; returns the number of calls it took.

    `limit` bounds the bytes of one call. Raises ShortReadError if the file ends too early, OSError as the system says.
    """
    done, calls = 0, 0
    while done < len(buffer):
        count = (preadv or os.preadv)(fd, [buffer[done : done + limit]], offset + done)
        calls += 1
        if count == 0:
            raise ShortReadError(f"the file ends at byte {offset + done}, {len(buffer) - done} bytes too early")
        done += count
    return calls


def write_exactly(fd: int, buffer: memoryview, offset: int, limit: int = MAX_READ) -> None:
    """Write all of `buffer` (contiguous bytes) at `offset`."""
    done = 0
    while done < len(buffer):
        done += os.pwritev(fd, [buffer[done : done + limit]], offset + done)


def cut_extent(offset: int, count: int) -> Iterator[tuple[int, int]]:
    """Cut an extent of a file into pieces (offset, bytes) of at most PIECE_BYTES that meet at aligned places."""
    end = offset + count
    while offset < end:
        border = (offset + PIECE_BYTES) // BORDER_BYTES * BORDER_BYTES
        yield offset, min(border, end) - offset
        offset = border


def open_for_reading(path: str) -> int:
    """Return a file descriptor for positioned reads, with the system told to read ahead."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return fd


def modified(status: os.stat_result) -> tuple[int, int]:
    """What changes when a file does: its size, and when it was written."""
    return status.st_size, status.st_mtime_ns


class SourceFile:
    """A model's file of a known size, open for threads that read it by offset.

    Errors that may pass are tried again, a bounded number of times; everything that fails is a UserError.
    """

    def __init__(self, path: str, size: int, limit: int = MAX_READ):
        self.path = path
        self.limit = limit
        self.stopped = Event()
        self.reopening = Lock()
        self.fd = -1
        try:
            self.fd = self._patiently(lambda: open_for_reading(path), "it")
        except OSError as error:
            raise UserError(
                f"{path}: {(error.strerror or str(error)).lower()} on this rank's host: "
                "the model must lie on a file system that all hosts share."
            ) from error
        self.opened = modified(os.fstat(self.fd))
        if self.opened[0] != size:
            self.close()
            raise UserError(f"{path}: has {self.opened[0]} bytes on this rank's host, but rank 0 sees {size}.")

    def read(self, buffer: memoryview, offset: int, name: str) -> None:
        """Fill a buffer (contiguous bytes) with bytes of the tensor `name`."""

        def preadv(fd: int, buffers: Sequence[memoryview], place: int) -> int:
            return self._patiently(lambda: os.preadv(fd, buffers, place), f"tensor {name} at byte {place}")

        try:
            read_exactly(self.fd, buffer, offset, self.limit, preadv)
        except OSError as error:
            raise UserError(
                f"{self.path}: tensor {name} cannot be read at byte {offset}: {error.strerror or error}; "
                "is the file still being written, or was it changed?"
            ) from error

    def drop(self, offset: int, count: int) -> None:
        """Let the system forget what it cached of some bytes: they are not read again."""
        if count:  # 0 would mean all that follow
            os.posix_fadvise(self.fd, offset, count, os.POSIX_FADV_DONTNEED)

    def drop_all(self) -> None:
        """Let the system forget the whole file."""
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        """UserError if the file was written to since it was opened."""
        try:
            found = modified(os.fstat(self.fd))
        except OSError as error:
            raise changed(self.path) from error
        if found != self.opened:
            raise changed(self.path)

    def stop(self) -> None:
        """Make reads that are under way end soon, with ReadStoppedError."""
        self.stopped.set()

    def close(self) -> None:
        """Give the file back."""
        os.close(self.fd)

    def _patiently(self, action: Callable[[], T], what: str) -> T:
        """Do it, again after a pause if the error may pass."""
        for number, pause in enumerate(PAUSES, 1):
            if self.stopped.is_set():
                raise ReadStoppedError
            try:
                return action()
            except OSError as error:
                if error.errno not in PASSING:
                    raise
                logging.getLogger(__name__).warning(
                    "%s: reading %s failed (%s), try %d of %d follows in %s s.",
                    self.path, what, error.strerror, number + 1, len(PAUSES) + 1, pause,
                )  # fmt: skip
                self.stopped.wait(pause)
                if error.errno == errno.ESTALE and self.fd >= 0:
                    self._reopen()
        return action()

    def _reopen(self) -> None:
        """Take the file by its name again, under the same descriptor, since other threads use it too.

        Another passing error leaves the next try to find it out.
        """
        with self.reopening:
            try:
                fd = open_for_reading(self.path)
            except OSError as error:
                if error.errno in PASSING:
                    return
                raise ChangedFileError(f"it vanished while it was read ({error.strerror})") from error
            try:
                if modified(os.fstat(fd)) != self.opened:
                    raise ChangedFileError("it changed while it was read")
                os.dup2(fd, self.fd, inheritable=False)
            finally:
                os.close(fd)


def changed(path: str) -> UserError:
    """The refusal of a file that did not stay the same."""
    return UserError(f"{path}: changed while it was read: run again once nothing writes to it.")
