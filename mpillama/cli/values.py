"""What the values of options mean: `-` for standard input, files to write."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mpillama.errors import UserError


def read_standard_input() -> str:
    """All of it; UserError if it is no text."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text ({error}): correct that byte.") from error


def refuse_unwritable(option: str, path: str | None) -> None:
    """Raise UserError if the file of an option could not be written; the file itself is left as it is."""
    if path is None:
        return
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise UserError(f"{option} {path}: there is no folder {folder}: make it, or name another file.")
    if Path(path).is_dir():
        raise UserError(f"{option} {path} is a folder: name a file.")
    if not os.access(path if Path(path).exists() else folder, os.W_OK):
        raise UserError(f"{option} {path}: no permission to write there: name another file.")


@contextmanager
def output_file(option: str, path: str) -> Iterator[BinaryIO]:
    """Open the file of an option; what the system refuses (a full disk) is a UserError."""
    try:
        with Path(path).open("wb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror}).") from error
