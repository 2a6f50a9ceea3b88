"""Server-sent events, and work that is cancelled when its client disconnects."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, Self, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mpillama.server.async_engine import AnswerFailed, ClientGone
from mpillama.server.errors import error_object, status_of

T = TypeVar("T")
BEAT_SECONDS = 15.0
"""Without an event for so long, a comment keeps the connection alive."""
BEAT = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def named_event(name: str, value: Any) -> bytes:
    """An event with a name and a JSON value."""
    return b"event: " + name.encode() + b"\n" + event(value)


class Events:
    """A generator's events, with keep-alive comments in between; call `close` at the end."""

    def __init__(self, generator: AsyncGenerator[bytes]):
        self._generator = generator
        self._following: asyncio.Task[bytes] | None = None

    async def begin(self) -> None:
        """Wait for the first event, up to BEAT_SECONDS, so that an early failure can still set the status."""
        if await self._arrives() and self._following is not None and not self._following.cancelled():
            failure = self._following.exception()
            if failure is not None:
                raise failure

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if not await self._arrives() or self._following is None:
            return BEAT
        following, self._following = self._following, None
        return following.result()

    async def _arrives(self) -> bool:
        if self._following is None:
            self._following = asyncio.ensure_future(anext(self._generator))
        done, _ = await asyncio.wait({self._following}, timeout=BEAT_SECONDS)
        return bool(done)

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._generator.aclose()


class EventStream(Response):
    """Sends events until the end or the client's disconnect; a failure is sent as the last event."""

    def __init__(self, events: Events):
        super().__init__()
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            with suppress(ClientGone):  # nobody is left to be told
                await until_gone(receive, self._send_all(send))
        finally:
            await self.events.close()

    async def _send_all(self, send: Send) -> None:
        try:
            async for data in self.events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except AnswerFailed as error:
            failure = event(error_object(status_of(error), str(error)))
            await send({"type": "http.response.body", "body": failure, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def stream(request: Request, generator: AsyncGenerator[bytes]) -> Response:
    """The response that streams a generator's events; what fails before the first one is raised here."""
    events = Events(generator)
    try:
        await while_connected(request, events.begin())
    except BaseException:
        await events.close()
        raise
    return EventStream(events)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; ClientGone, with `work` cancelled, if the client disconnects."""
    return await until_gone(request.receive, work)


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
