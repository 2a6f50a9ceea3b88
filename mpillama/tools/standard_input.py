"""Text from standard input."""

import sys

from mpillama.errors import UserError


def read_standard_input() -> str:
    """All of it; UserError if it is no text."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text ({error}): correct that byte.") from error
