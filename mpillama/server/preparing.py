"""Work before a request reaches an engine (templates, tokens, grammars): in a few threads, within a time limit."""

import asyncio
import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from fastapi import Request

from mpillama.server.async_engine import ClientGone, QueueFull
from mpillama.server.errors import Refused
from mpillama.server.streams import while_connected

T = TypeVar("T")
Pause = Callable[[], None]
"""To be called between pieces of work: it raises once the client is gone or the time is up."""

SMALL_BYTES = 64 << 10
SMALL_WORKERS, LARGE_WORKERS = 4, 2
"""Large bodies have separate threads, so small ones never wait behind them."""
MOST_WAITING = 1024
SECONDS = 30.0
"""How long the work for a request may take, waiting for a thread included."""


class Preparation:
    """Runs work for requests while their clients are connected, for at most `seconds`."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds = seconds
        self.waiting = 0
        self._small = ThreadPoolExecutor(SMALL_WORKERS, "prepare")
        self._large = ThreadPoolExecutor(LARGE_WORKERS, "prepare-large")

    async def run(self, request: Request, work: Callable[[Pause], T]) -> T:
        """What `work` returns; ClientGone, Refused or QueueFull if it was given up."""
        if self.waiting >= MOST_WAITING:
            raise QueueFull(f"{self.waiting} requests are being prepared")
        is_large = len(await request.body()) > SMALL_BYTES
        wanted = Wanted(time.monotonic() + self.seconds)
        pool = self._large if is_large else self._small
        future = pool.submit(_work, work, wanted, is_large)
        self.waiting += 1
        try:
            return await while_connected(request, self._result(future, wanted))
        finally:
            self.waiting -= 1
            wanted.end()

    async def _result(self, future: Future[T], wanted: "Wanted") -> T:
        try:
            async with asyncio.timeout(self.seconds):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            if wanted.begun:
                raise wanted.too_long() from error
            raise QueueFull(f"this request was not prepared within {self.seconds:g} s, others came first") from error


class Wanted:
    """Whether work is still wanted; shared by the event loop and a worker thread."""

    def __init__(self, until: float):
        self.begun = False
        self._until = until
        self._ended = threading.Event()

    def end(self) -> None:
        self._ended.set()

    def pause(self) -> None:
        """ClientGone, or Refused if it has taken too long."""
        self.begun = True
        if self._ended.is_set():
            raise ClientGone
        if time.monotonic() > self._until:
            raise self.too_long()

    def too_long(self) -> Refused:
        return Refused(422, "the texts or the grammar of this request take too long to prepare: shorten or divide them")


def _work(work: Callable[[Pause], T], wanted: Wanted, is_large: bool) -> T:
    wanted.pause()
    try:
        return work(wanted.pause)
    finally:
        if is_large:
            _give_memory_back()


async def prepared(request: Request, work: Callable[[Pause], T]) -> T:
    """What `work` returns, by the application's Preparation."""
    preparation: Preparation = request.app.state.preparation
    return await preparation.run(request, work)


def _give_memory_back() -> None:
    """A tokenizer takes some hundred bytes for each token, which the C library keeps if it is not told otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc has it
        trim(0)
