"""uvicorn in a thread of its own, with patience that has an end: for headers, bodies, and readers."""

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mpillama.errors import UserError
from mpillama.server.connections import Crowd, Door, Place

HEADER_BYTES = 64 << 10
HEADER_SECONDS = 20.0
"""How long a client may take to send the head of a request."""
KEEP_ALIVE_SECONDS = 60
START_SECONDS = 30.0
CLOSE_SECONDS = 5
"""Left to connections to end by themselves once the server does."""
ABORT = "mpillama.abort"
"""The scope's extension that drops the connection at once."""
BACKLOG = 1024


@dataclass(frozen=True)
class Address:
    """Where to listen; both files for TLS or neither."""

    host: str
    port: int
    certificate: str | None = None
    key: str | None = None

    @property
    def scheme(self) -> str:
        return "https" if self.certificate else "http"

    def bind(self) -> socket.socket:
        """A socket that listens; UserError if that cannot be had."""
        for path in filter(None, (self.certificate, self.key)):
            if not Path(path).is_file():
                raise UserError(f"{path}: there is no such file: give --tls-certificate and --tls-key in PEM form.")
        try:
            family = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((self.host, self.port), family=family, backlog=BACKLOG)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"--host {self.host} --port {self.port}: cannot be listened to ({reason}): choose others."
            ) from error


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which drops those who never finish the head of a request."""

    write_seconds = 60.0
    place: Place
    _timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # asyncio does it only for sockets made with a protocol number; without it, tokens wait for acknowledgements.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self.place.drop = transport.abort
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """A piece of a request, maybe of its head only."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.place.gone()
        self._stop_timer()
        self._stop_reader_timer()

    def pause_writing(self) -> None:
        """The client does not take what is sent, maybe the end of an answer that nobody waits for any more."""
        super().pause_writing()
        self._reader_timer = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_reader_timer()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, or only close if that shows after the answer, in the rest of the request."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def handle_events(self) -> None:
        """Begin the requests whose head is complete; each may drop the connection."""
        super().handle_events()
        if self._answering:
            self.place.busy()
        if self.scope is not None:
            self.scope.setdefault("extensions", {})[ABORT] = {"call": self.transport.abort}

    def on_response_complete(self) -> None:
        """Wait for the next request, or begin it if it is there already."""
        self.place.idle()
        super().on_response_complete()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch_head(self) -> None:
        if self._answering:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        if not self._answering:
            self.transport.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_reader_timer(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None


class CrowdedServer(uvicorn.Server):
    """uvicorn's server, behind a door that lets no more connections in than there is room for."""

    def __init__(self, config: uvicorn.Config, most_connections: int):
        super().__init__(config)
        self.crowd = Crowd(most_connections)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        self.servers = [Door(bound, self.crowd, self._protocol, self.config.ssl) for bound in sockets or ()]  # type: ignore[misc]
        self.started = True

    def _protocol(self, place: Place) -> asyncio.Protocol:
        make = cast("type[PatientProtocol]", self.config.http_protocol_class)
        protocol = make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        protocol.place = place
        return protocol


class HttpServer:
    """Answers requests on a bound socket in a thread; what escapes from there ends the job (comm/failure)."""

    def __init__(
        self, app: Any, address: Address, bound: socket.socket, write_timeout: float, most_connections: int
    ):  # fmt: skip
        class Protocol(PatientProtocol):
            """With this server's patience."""

            write_seconds = write_timeout

        self._bound = bound
        config = uvicorn.Config(
            app, http=Protocol, ws="none", loop="asyncio", lifespan="off", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=CLOSE_SECONDS,
            ssl_certfile=address.certificate, ssl_keyfile=address.key,
        )  # fmt: skip
        self._server = CrowdedServer(config, most_connections)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._began = threading.Event()
        self._on_start: Callable[[asyncio.AbstractEventLoop], None] = lambda loop: None

    def start(self, on_start: Callable[[asyncio.AbstractEventLoop], None]) -> None:
        """Begin; `on_start` is called in the server's event loop first."""
        self._on_start = on_start
        self._load_tls()
        self._thread.start()
        self._began.wait(START_SECONDS)

    def _load_tls(self) -> None:
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it would warn of every malformed request
        try:
            self._server.config.load()
        except OSError as error:  # ssl.SSLError is one
            raise UserError(f"--tls-certificate, --tls-key: cannot be used ({error}): give PEM files.") from error

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._on_start(asyncio.get_running_loop())
        self._began.set()
        await self._server.serve([self._bound])

    def stop(self) -> None:
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS + START_SECONDS)
