"""Secrets of this process, which nothing that it prints, logs or records may show."""

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

HIDDEN = "***"
SECRET_FLAG = re.compile(r"--?(?:api|access|auth|hf)?[-_]?(?:key|token|secret|password|passwd)")
API_KEY = "--api-key"
SECRET_VARIABLE = re.compile(r"MPILLAMA_\w*(?:KEY|TOKEN|SECRET|PASSWORD)")
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*(?=@)")
"""User and password in a URL."""
COMMON = 4
"""Shorter values are parts of too many words to be looked for; as arguments they are hidden all the same."""
NOT_SECRET = frozenset(["auto"])

_told: set[str] = set()


def keep_secret(value: str | None) -> None:
    """Hide a value from now on: one that was read from a file or made here."""
    if value:
        _told.add(value)


def hide(text: str) -> str:
    """The text without the secrets that are known here: given as arguments or in the environment, or told."""
    known = {*_told, *secrets_of(sys.argv[1:], os.environ)} - NOT_SECRET
    for value in sorted((value for value in known if len(value) >= COMMON), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", HIDDEN, text)
    return IN_ADDRESS.sub(HIDDEN, text)


def shown_arguments(arguments: Sequence[str]) -> str:
    """A command line as it may be written down."""
    shown = list(arguments)
    for i, start, _ in _values(arguments):
        shown[i] = shown[i][:start] + HIDDEN
    return hide(" ".join(shown))


def secrets_of(arguments: Sequence[str], environment: Mapping[str, str]) -> set[str]:
    """The values of options and variables that hold secrets, however the option is abbreviated or misspelt."""
    found = {value for _, _, value in _values(arguments)}
    return (found | {value for name, value in environment.items() if SECRET_VARIABLE.fullmatch(name)}) - {""}


def _values(arguments: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Secret values: number of the argument, where in it the value begins, the value."""
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if not _is_secret(flag):
            continue
        if equals:
            yield i, len(flag) + 1, value
        elif i + 1 < len(arguments):
            yield i + 1, 0, arguments[i + 1]


def _is_secret(flag: str) -> bool:
    return bool(SECRET_FLAG.fullmatch(flag)) or (len(flag) > len("--") and API_KEY.startswith(flag))
