"""The rows of a batch file: OpenAI's batch form, or a plain one.

{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": […], …}}
{"id": "a", "prompt": "…" or "messages": […], …} with the body's fields beside them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mpillama.errors import UserError
from mpillama.openai.bodies import ChatBody, CompletionBody
from mpillama.openai.body import BadRequest, parse_body

CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, type[ChatBody] | type[CompletionBody]] = {CHAT_URL: ChatBody, COMPLETIONS_URL: CompletionBody}
MAX_LINE = 16 << 20
"""Bytes of a line that is still read as a row."""
PIECE = 1 << 20


@dataclass(frozen=True)
class Line:
    """A line of the input: its number from 1 on, its bytes (None if it is too long), and where the next begins."""

    number: int
    text: bytes | None
    end: int

    @property
    def key(self) -> int:
        return self.number


@dataclass(frozen=True)
class Row:
    id: str
    url: str
    body: ChatBody | CompletionBody


def read_lines(path: str) -> Iterator[Line]:
    """Go through the input without holding it; empty lines are left out. UserError if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            yield from _lines(file)
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}: give a file of JSON lines.") from error


def _lines(file: BinaryIO) -> Iterator[Line]:
    number = 0
    while text := file.readline(MAX_LINE + 1):
        number += 1
        too_long = len(text) > MAX_LINE
        if too_long:
            _skip_line(file, text)
        if too_long or text.strip():
            yield Line(number, None if too_long else text, file.tell())


def _skip_line(file: BinaryIO, text: bytes) -> None:
    while text and not text.endswith(b"\n"):
        text = file.readline(PIECE)


def row_id(line: Line) -> str | None:
    """The id of a line that may be no row at all; None if it has none that can be written."""
    try:
        fields = json.loads(line.text or b"")
        found = fields.get("custom_id", fields.get("id")) if isinstance(fields, dict) else None
        return found if isinstance(found, str) and found.encode() else None
    except (ValueError, RecursionError):  # no JSON, or no Unicode
        return None


def parse_row(line: Line) -> Row:
    """Check a line; BadRequest says what is wrong with it."""
    if line.text is None:
        raise BadRequest(f"the line is longer than {MAX_LINE >> 20} MiB")
    fields = _decode(line.text)
    if "custom_id" in fields or "body" in fields or "url" in fields:
        return _openai_row(fields)
    return _plain_row(fields)


def _decode(text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the line is no JSON object ({error})") from error
    if not isinstance(fields, dict):
        raise BadRequest("the line is no JSON object")
    return fields


def _openai_row(fields: dict[str, Any]) -> Row:
    unknown = sorted(set(fields) - {"custom_id", "method", "url", "body"})
    if unknown:
        raise BadRequest(f"{unknown[0]}: unknown field", unknown[0])
    if fields.get("method", "POST") != "POST":
        raise BadRequest("method: must be POST", "method")
    url = fields.get("url", CHAT_URL)
    if not isinstance(url, str) or url not in BODIES:
        raise BadRequest(f"url: must be one of {', '.join(BODIES)}", "url")
    return Row(_id(fields, "custom_id"), url, parse_body(BODIES[url], fields.get("body")))


def _plain_row(fields: dict[str, Any]) -> Row:
    name = _id(fields, "id")
    if ("messages" in fields) == ("prompt" in fields):
        raise BadRequest("a row needs prompt or messages, one of them")
    url = CHAT_URL if "messages" in fields else COMPLETIONS_URL
    return Row(name, url, parse_body(BODIES[url], {key: value for key, value in fields.items() if key != "id"}))


def _id(fields: dict[str, Any], name: str) -> str:
    found = fields.get(name)
    if not isinstance(found, str) or not found:
        raise BadRequest(f"{name}: must be a text that is not empty", name)
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"{name}: is not valid Unicode", name) from error
    return found
