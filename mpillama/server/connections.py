"""Who is connected: fewer than the files that the process may open, and room is made for who comes.

A connection is idle while it has no request under way: before its TLS handshake is done, before the head of a request
is there, and after an answer. The longest idle one is dropped for a new one, so that a crowd of silent clients keeps
nobody out.
"""

import asyncio
import resource
import socket
import ssl
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mpillama.errors import UserError

FILES_KEPT = 64
"""Open files that are left to the rest of the process: the model, logs, the page."""
PLACES_KEPT = 16
"""Connections beyond those that may have requests: for /health, and to tell others that there are too many."""
FEWEST = 8
HANDSHAKE_SECONDS = 10.0
PAUSE_SECONDS = 0.1
"""Until the next try if the system gives no more files although nobody is idle."""


def raise_file_limit(wanted: int) -> int:
    """How many files this process may open; as many as `wanted` if the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return soft


def most_connections(requests: int) -> int:
    """How many connections may be open where so many requests may; UserError if there are not enough files."""
    opened = len(list(Path("/proc/self/fd").iterdir()))
    wanted = 2 * requests + PLACES_KEPT
    files = raise_file_limit(opened + FILES_KEPT + wanted)
    if files - opened - FILES_KEPT < FEWEST + PLACES_KEPT:
        least = opened + FILES_KEPT + FEWEST + PLACES_KEPT
        raise UserError(f"this process may open {files} files only: allow at least {least} (`ulimit -n {least}`).")
    return min(wanted, files - opened - FILES_KEPT)


class Place:
    """A connection that is counted until it is `gone`."""

    def __init__(self, crowd: "Crowd"):
        self._crowd = crowd
        self.drop: Callable[[], object] = lambda: None

    def idle(self) -> None:
        self._crowd.waiting[self] = None
        self._crowd.waiting.move_to_end(self)

    def busy(self) -> None:
        self._crowd.waiting.pop(self, None)

    def gone(self) -> None:
        """It is closed, or will be at once."""
        self._crowd.waiting.pop(self, None)
        self._crowd.places.discard(self)


class Crowd:
    """All connections, `most` at once; lives in the server's event loop."""

    def __init__(self, most: int):
        self.most = most
        self.places: set[Place] = set()
        self.waiting: OrderedDict[Place, None] = OrderedDict()

    def enter(self) -> Place | None:
        """A place for a connection, maybe that of the longest idle one; None if all have requests."""
        if len(self.places) >= self.most and not self.drop_longest_idle():
            return None
        place = Place(self)
        self.places.add(place)
        place.idle()
        return place

    def drop_longest_idle(self) -> bool:
        """Whether there was an idle connection."""
        if not self.waiting:
            return False
        place = next(iter(self.waiting))
        place.gone()
        place.drop()
        return True


MakeProtocol = Callable[[Place], asyncio.Protocol]


class Door:
    """Takes connections from a listening socket, as asyncio's own server would."""

    def __init__(self, bound: socket.socket, crowd: Crowd, make: MakeProtocol, tls: ssl.SSLContext | None):
        self._bound = bound
        self._crowd = crowd
        self._make = make
        self._tls = tls
        self._beginning: set[asyncio.Task[None]] = set()
        bound.setblocking(False)
        self._accepting = asyncio.ensure_future(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._bound)
            except ConnectionError:
                continue  # it has gone before it was taken
            except OSError:  # no more files, or memory
                await asyncio.sleep(0 if self._crowd.drop_longest_idle() else PAUSE_SECONDS)
                continue
            self._let_in(connection)
            await asyncio.sleep(0)  # sockets that were dropped are closed meanwhile

    def _let_in(self, connection: socket.socket) -> None:
        place = self._crowd.enter()
        if place is None:
            connection.close()
            return
        task = asyncio.ensure_future(self._begin(connection, place))
        place.drop = task.cancel
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)

    async def _begin(self, connection: socket.socket, place: Place) -> None:
        loop, patience = asyncio.get_running_loop(), HANDSHAKE_SECONDS if self._tls else None
        protocol = self._make(place)
        try:
            await loop.connect_accepted_socket(
                lambda: protocol, connection, ssl=self._tls, ssl_handshake_timeout=patience
            )
        except (OSError, asyncio.CancelledError):  # ssl.SSLError and TimeoutError are OSErrors: it is no TLS, or slow
            connection.close()
            place.gone()

    def close(self) -> None:
        for task in (self._accepting, *self._beginning):
            task.cancel()

    async def wait_closed(self) -> None:
        await asyncio.gather(self._accepting, *self._beginning, return_exceptions=True)
