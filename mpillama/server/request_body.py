"""Reading request bodies: decompression and strict JSON, with limits on size, depth and digits."""

import json
import math
import zlib
from typing import Any, NoReturn

from mpillama.openai.body import BadRequest
from mpillama.server.errors import Refused

GZIP = (b"gzip", b"x-gzip")
PLAIN = (b"", b"identity")
GZIP_WINDOW = 16 + zlib.MAX_WBITS


class Unpacker:
    """Decompresses a body piece by piece: one gzip stream, or plain bytes."""

    def __init__(self, encoding: bytes):
        encoding = encoding.strip().lower()
        if encoding not in GZIP + PLAIN:
            shown = encoding.decode("latin-1")[:40]
            raise Refused(415, f"send the body plain or with Content-Encoding: gzip, not {shown!r}")
        self._stream = zlib.decompressobj(GZIP_WINDOW) if encoding in GZIP else None
        self._begun = False

    def push(self, data: bytes, room: int) -> bytes:
        """Decompress a piece, to at most `room` + 1 bytes: one more than allowed shows that the body is too large."""
        if self._stream is None:
            return data
        self._begun = self._begun or bool(data)
        try:
            found = self._stream.decompress(data, room + 1)
        except zlib.error as error:
            raise Refused(400, "body: is not gzip, as its Content-Encoding says") from error
        if self._stream.unused_data:
            raise Refused(400, "body: goes on behind the end of its gzip stream")
        return found

    def finish(self) -> None:
        """Call at the end of the body; Refused if the gzip stream is incomplete."""
        if self._begun and self._stream is not None and not self._stream.eof:
            raise Refused(400, "body: its gzip stream is cut off")


MOST_DIGITS = 400
"""Digits of an integer: no field needs more, and parsing takes quadratic time."""

MOST_LEVELS = 100
MOST_FIELDS = 10_000


def load_json(body: bytes) -> Any:
    """The value of a body; BadRequest if it is not JSON in UTF-8."""
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_bounded)
    except RecursionError as error:
        raise BadRequest("body: is nested too deeply", "body") from error
    except ValueError as error:  # wrong JSON, or bytes that are no text
        raise BadRequest(f"body: is not valid JSON ({error})", "body") from error
    _check_shape(value)
    return value


def _check_shape(value: Any) -> None:
    """Refuse nesting that pydantic and llguidance cannot follow, and objects with very many fields."""
    level = [value]
    for _ in range(MOST_LEVELS):
        if any(len(part) > MOST_FIELDS for part in level if isinstance(part, dict)):
            raise BadRequest(f"body: an object has more than {MOST_FIELDS} fields", "body")
        parts = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list))
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
        if not level:
            return
    raise BadRequest("body: is nested too deeply", "body")


def _refuse(constant: str) -> NoReturn:
    raise BadRequest(f"body: {constant} is not JSON", "body")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadRequest(f"body: the number {text[:40]} is too large", "body")
    return value


def _bounded(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise BadRequest("body: a number has too many digits", "body")
    return int(text)
