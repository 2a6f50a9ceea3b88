"""Reading a binary header piece by piece, with bounds."""

import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mpillama.errors import UserError
from mpillama.formats.foreign import damaged, regular_size, unreadable
from mpillama.formats.stand_ins import HEAD_BYTES, refuse_stand_in

MOST_HEADER = 2**27
"""Bytes of a header that are read at the most; the largest vocabularies take a tenth of it."""


class Cursor:
    """A place in a file; what would lie past the end is refused before memory is asked for."""

    def __init__(self, path: str, limit: int = MOST_HEADER):
        self.path = path
        self.size = regular_size(path)
        self.end = min(self.size, limit)
        self.place = 0
        try:
            self.file = Path(path).open("rb")  # noqa: SIM115 - closed by __exit__
            head = self.file.read(HEAD_BYTES)
            self.file.seek(0)
        except OSError as error:
            raise unreadable(path, error) from error
        try:
            refuse_stand_in(path, head)
        except UserError:
            self.file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def expect(self, count: int, what: str) -> None:
        """Refuse a header that has no room for `count` more bytes."""
        if count < 0 or count > self.end - self.place:
            raise damaged(
                self.path,
                f"at byte {self.place} it promises {count} bytes of {what}, but its header ends by byte {self.end}",
            )

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        self.expect(count, what)
        try:
            data = self.file.read(count)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if len(data) != count:
            raise damaged(self.path, f"it ends at byte {self.place + len(data)} while it is read")
        self.place += count
        return data

    def number(self, code: str, what: str) -> Any:
        """The next little-endian number, by its letter in the struct module."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]
