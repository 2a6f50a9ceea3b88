"""Exact reads at 64-bit offsets."""

import os

MAX_READ = 0x7FFF_F000
"""Bytes that Linux moves in one read call at the most (read(2))."""


class ShortReadError(OSError):
    """The file ended before the bytes that were asked for."""


def read_exactly(fd: int, buffer: memoryview, offset: int, limit: int = MAX_READ) -> int:
    """Fill `buffer` (contiguous bytes) from `offset` of an open file; returns the number of calls it took.

    `limit` bounds the bytes of one call. Raises ShortReadError if the file ends too early, OSError as the system says.
    """
    done, calls = 0, 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done : done + limit]], offset + done)
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
