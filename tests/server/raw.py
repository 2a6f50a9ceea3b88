"""HTTP by hand: requests that no library would send, and what comes back."""

import json
import re
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from tests.system.mpi.launch import ROOT

HOST = b"Host: localhost\r\n"
ABORTING = struct.pack("ii", 1, 0)
"""SO_LINGER that makes close() a reset."""
MOST = 1 << 16
"""Bytes that are received at once."""
PLACES = "|".join(re.escape(f"{place}/") for place in (ROOT, "/usr", "/home", "/root")).encode()
TRACES = re.compile(rb"Traceback|site-packages|File \\?\"|\.py\b|pydantic_core|" + PLACES)
"""What no client may see of the program."""


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error object that it must be."""
        found = json.loads(self.body)["error"]
        assert set(found) == {"message", "type", "param", "code"}, found
        assert isinstance(found["message"], str)
        assert found["message"]
        assert found["type"] == ("server_error" if self.status >= 500 else "invalid_request_error"), found
        return dict(found)

    def complaint(self) -> str:
        """What no answer to a malformed request may be; empty if all is well."""
        if self.status >= 500 and self.status != 503:
            return f"status {self.status}: {self.body[:300]!r}"
        if TRACES.search(self.body):
            return f"shows the program: {self.body[:300]!r}"
        is_apps = "x-content-type-options" in self.headers  # what is not HTTP never reaches the app
        if is_apps and self.status >= 400 and self.body:
            try:
                _ = self.error
            except (ValueError, KeyError, TypeError, AssertionError) as error:
                return f"status {self.status} without an error object ({error}): {self.body[:300]!r}"
        return ""


@dataclass
class Wire:
    """A connection to a server; every wait is bounded by `seconds`."""

    url: str
    seconds: float = 20.0
    receive_buffer: int | None = None
    _data: bytes = b""
    _socket: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        place = urlsplit(self.url)
        assert place.hostname
        assert place.port
        self._socket = socket.socket()
        if self.receive_buffer:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
        self._socket.settimeout(self.seconds)
        self._socket.connect((place.hostname, place.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Go away."""
        self._socket.close()

    def reset(self) -> None:
        """Go away without a word."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORTING)
        self._socket.close()

    def wait_at_most(self, seconds: float) -> None:
        """Bound the waits from now on."""
        self._socket.settimeout(seconds)

    def end_input(self) -> None:
        """Say that nothing more comes, and listen on."""
        self._socket.shutdown(socket.SHUT_WR)

    def send(self, data: bytes) -> bool:
        """Whether the server still took it."""
        try:
            self._socket.sendall(data)
        except OSError:
            return False
        return True

    def receive(self) -> bytes:
        """Some bytes, none at the end; TimeoutError if none come."""
        try:
            return self._socket.recv(MOST)
        except (ConnectionResetError, BrokenPipeError):
            return b""

    def catch_up(self) -> None:
        """Receive until no more is there than what has just come."""
        while len(self.receive()) == MOST:
            pass

    def answer(self) -> Answer | None:
        """The next response, whole; None if the server closes the connection instead."""
        while b"\r\n\r\n" not in self._data:
            if not (more := self.receive()):
                return None
            self._data += more
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status = int(first.split()[1])
        if status < 200:
            return self.answer()
        return Answer(status, headers, self._body(status, headers))

    def _body(self, status: int, headers: dict[str, str]) -> bytes:
        if status in (204, 304):
            return b""
        if headers.get("transfer-encoding") == "chunked":
            return b"".join(iter(self._chunk, b""))
        if "content-length" in headers:
            return self._exactly(int(headers["content-length"]))
        while more := self.receive():
            self._data += more
        rest, self._data = self._data, b""
        return rest

    def _chunk(self) -> bytes:
        while b"\r\n" not in self._data:
            self._more()
        size, _, self._data = self._data.partition(b"\r\n")
        return self._exactly(int(size, 16) + 2)[:-2]

    def _exactly(self, count: int) -> bytes:
        while len(self._data) < count:
            self._more()
        found, self._data = self._data[:count], self._data[count:]
        return found

    def _more(self) -> None:
        more = self.receive()
        assert more, f"the connection ended in the midst of a response: {self._data[:200]!r}"
        self._data += more

    def ask(self, data: bytes) -> Answer | None:
        """Send a request and await its response."""
        self.send(data)
        return self.answer()


def post(path: str, body: bytes | dict[str, Any], *lines: bytes) -> bytes:
    """A request with JSON, and more lines for its head."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head("POST", path, b"Content-Type: application/json", b"Content-Length: %d" % len(content), *lines) + content


def head(method: str, path: str, *lines: bytes) -> bytes:
    """The head of a request."""
    more = b"".join(line + b"\r\n" for line in lines)
    return f"{method} {path} HTTP/1.1\r\n".encode() + HOST + more + b"\r\n"


def figure(http: httpx.Client, name: str) -> float:
    """A number of /metrics; the sum, if there are several."""
    text = http.get("/metrics").raise_for_status().text
    found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def until(holds: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait until something holds; AssertionError if it does not so soon."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def active(http: httpx.Client) -> int:
    """Answers that are under way or wait."""
    return int(figure(http, "mpillama_active_tasks"))


def first_of(texts: Sequence[str], count: int = 5) -> str:
    """The beginning of a list of complaints."""
    return f"{len(texts)} complaints:\n" + "\n".join(texts[:count])
