"""ASGI middleware: authentication, limits on size and time, CORS and security headers, for every path."""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpillama.server.async_engine import ClientGone, QueueFull
from mpillama.server.errors import Refused, response_to
from mpillama.server.http_server import ABORT
from mpillama.server.request_body import Unpacker

LOG = logging.getLogger(__name__)

OPEN_PATHS = ("/", "/health", "/openapi.json")
"""Paths that need no key; nor do the page's files."""
HEALTH = "/health"
"""Always answered: exempt from the limit on open requests, its body ignored."""
PAGE = "/page/"
ASKER = "mpillama.asker"
"""Scope entry: digest of the client's key; absent without one."""
UNKNOWN = "mpillama.unknown"
"""Scope entry: the body's unknown fields, reported in a header."""
UNKNOWN_HEADER = b"X-Mpillama-Ignored"
MOST_NAME = 100
"""Characters of each."""
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)


@dataclass(frozen=True)
class Rules:
    """Limits for clients; `key` None admits everybody, `hosts` None accepts any Host header."""

    key: str | None = field(repr=False)
    hosts: frozenset[str] | None
    most_requests: int
    body_bytes: int
    body_seconds: float
    write_seconds: float
    all_bodies_bytes: int
    origins: frozenset[str] = frozenset()


class Middleware:
    """Reads each body completely, within limits, before the application sees the request.

    `note` is called for each request with path, status (499 if the client left early) and seconds.
    """

    def __init__(
        self, app: ASGIApp, rules: Rules, note: Callable[[str, int, float], None] = lambda path, status, s: None
    ):
        self.app = app
        self.rules = rules
        self.note = note
        self.requests = 0
        self.held_bytes = 0
        self._digest = None if rules.key is None else _digest(rules.key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":  # as GET; the server sends no body, and its length all the same
            scope = {**scope, "method": "GET"}
        self.requests += 1
        held = _Held()
        writer, began = _Writer(scope, send, self.rules.write_seconds, self._cors(scope)), time.monotonic()
        try:
            await self._pass_on(scope, receive, writer.send, held)
        finally:
            self.requests -= 1
            self.held_bytes -= held.bytes
            path = getattr(scope.get("route"), "path", "other")
            self.note(path, writer.status, time.monotonic() - began)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, held: "_Held") -> None:
        try:
            if self._is_preflight(scope):
                return await _answer_preflight(scope, send)
            self._check_head(scope)
            if shown := _header(scope, b"authorization"):
                scope[ASKER] = _digest(shown).hex()
            body = b"" if scope["path"] == HEALTH else await self._body(scope, receive, held)
        except (Refused, QueueFull) as error:
            return await response_to(error)(scope, receive, send)
        try:
            return await self.app(scope, _Replay(body, receive), send)
        except Exception as error:  # noqa: BLE001 - the client was told, and the log (server/errors)
            LOG.debug("a request ended by %s", type(error).__name__)

    def _check_head(self, scope: Scope) -> None:
        """Refuse by what is known before the body."""
        if self.requests > self.rules.most_requests and scope["path"] != HEALTH:
            raise QueueFull(f"{self.requests} requests are open, and no more than {self.rules.most_requests} may be")
        self._check_host(scope)
        path = scope["path"]
        is_file = path.startswith(PAGE) and scope["method"] != "POST"
        if not (path in OPEN_PATHS or is_file) and not self._may_ask(scope):
            raise Refused(401, "give this server's key: Authorization: Bearer KEY")
        kind = _header(scope, b"content-type").split(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            raise Refused(415, "send JSON, with Content-Type: application/json")

    def _check_host(self, scope: Scope) -> None:
        """A page of another site whose name was made to point here must not ask (DNS rebinding)."""
        host = _header(scope, b"host").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if self.rules.hosts is not None and name not in self.rules.hosts:
            raise Refused(421, f"this server is not called {name!r}: use its own URL, or give it a key (--api-key)")

    def _may_ask(self, scope: Scope) -> bool:
        scheme, _, given = _header(scope, b"authorization").partition(b" ")
        fits = self._digest is None or hmac.compare_digest(_digest(given.strip()), self._digest)
        return self._digest is None or (fits and scheme.lower() == b"bearer")

    async def _body(self, scope: Scope, receive: Receive, held: "_Held") -> bytes:
        """The whole body; Refused if it is too large or takes too long."""
        length = b"" if _header(scope, b"transfer-encoding") else _header(scope, b"content-length")
        if length.isdigit() and int(length[:20]) > self.rules.body_bytes:
            raise self._too_large()
        unpacker = Unpacker(_header(scope, b"content-encoding"))
        try:
            async with asyncio.timeout(self.rules.body_seconds):
                return await self._read(receive, held, unpacker)
        except TimeoutError as error:
            raise Refused(408, f"the body did not come within {self.rules.body_seconds:g} s") from error

    async def _read(self, receive: Receive, held: "_Held", unpacker: Unpacker) -> bytes:
        parts = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(408, "the client went away")
            parts.append(unpacker.push(message.get("body", b""), self.rules.body_bytes - held.bytes))
            held.bytes += len(parts[-1])
            self.held_bytes += len(parts[-1])
            if held.bytes > self.rules.body_bytes:
                raise self._too_large()
            if self.held_bytes > self.rules.all_bodies_bytes:
                raise QueueFull(
                    f"the bodies of open requests have more than {self.rules.all_bodies_bytes} bytes together"
                )
            if not message.get("more_body"):
                unpacker.finish()
                return b"".join(parts)

    def _too_large(self) -> Refused:
        return Refused(413, f"the body is larger than {self.rules.body_bytes} bytes")

    def _is_preflight(self, scope: Scope) -> bool:
        return scope["method"] == "OPTIONS" and bool(self._cors(scope))

    def _cors(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """The headers that let a page of another origin ask; none unless that origin was allowed."""
        origin = _header(scope, b"origin")
        if origin.decode("latin-1") not in self.rules.origins:
            return []
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", b"Retry-After, " + UNKNOWN_HEADER),
            (b"vary", b"Origin"),
        ]


@dataclass
class _Held:
    """Bytes of a request's body that are in memory."""

    bytes: int = 0


class _Replay:
    """Replays a body that was already read, then forwards the client's further messages."""

    def __init__(self, body: bytes, receive: Receive):
        self._message: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        message, self._message = self._message, None
        return message or await self._receive()


class _Writer:
    """Sends with security headers, and drops a client that does not read."""

    def __init__(self, scope: Scope, send: Send, seconds: float, headers: list[tuple[bytes, bytes]]):
        self._scope = scope
        self._send = send
        self._seconds = seconds
        self._headers = [*SECURITY_HEADERS, *headers]
        self.status = 499  # until something is answered

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), *self._headers, *_unknown(self._scope), *_close(self._scope)]
            message = {**message, "headers": headers}
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except TimeoutError as error:
            self._scope.get("extensions", {}).get(ABORT, {"call": lambda: None})["call"]()
            raise ClientGone from error


def _unknown(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The header that names fields without a meaning; they are strangers' words, so all but letters is escaped."""
    names = [quote(name[:MOST_NAME], safe="", errors="surrogatepass") or '""' for name in scope.get(UNKNOWN, ())]
    return [(UNKNOWN_HEADER, ", ".join(names).encode())] if names else []


def _close(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The header that ends a connection whose request had two lengths (RFC 9112, 6.3): what follows may be anything."""
    two_lengths = _header(scope, b"transfer-encoding") and _header(scope, b"content-length")
    return [(b"connection", b"close")] if two_lengths else []


async def _answer_preflight(scope: Scope, send: Send) -> None:
    """Allow an origin that was named whatever headers it wants to send: they open nothing by themselves."""
    wanted = _header(scope, b"access-control-request-headers") or b"Authorization, Content-Type"
    headers = [
        (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE"),
        (b"access-control-allow-headers", wanted),
        (b"access-control-max-age", b"600"),
        (b"vary", b"Access-Control-Request-Headers"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _digest(key: bytes) -> bytes:
    """Of one length, so that comparing takes the same time for any key."""
    return hashlib.sha256(key).digest()
