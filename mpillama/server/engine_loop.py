"""Rank 0's main thread while it serves: requests of the server's thread to the router, outputs back.

MPI is called from here only.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty

from mpillama.job.deadline import Deadline, StopRequest
from mpillama.server.async_engine import AsyncEngine
from mpillama.server.engine_requests import EngineRouter

NAP = 0.002
"""Seconds between two looks at the mail of other replicas, and at grammars that are built."""
LOOK = 0.05
"""Seconds between two looks at signals, other replicas and the clock while nothing is to be done."""


@dataclass(frozen=True)
class Shutdown:
    """What ends the server: a signal, or the end of the job's time; answers have `grace` seconds to finish then."""

    stop: StopRequest
    deadline: Deadline
    grace: float

    @property
    def reason(self) -> str:
        """Why no more requests are taken; empty while they are."""
        if self.stop.name:
            return self.stop.name
        return "the end of the job's time" if self.deadline.left <= self.grace else ""


class EngineLoop:
    """Runs the router for the server's thread; `on_drain(reason)` is called once, when the end comes near."""

    def __init__(self, router: EngineRouter, engine: AsyncEngine, shutdown: Shutdown, on_drain: Callable[[str], None]):
        self.router = router
        self.engine = engine
        self.shutdown = shutdown
        self.on_drain = on_drain
        self._drains_until: float | None = None

    def run(self) -> None:
        """Go on until the server shuts down and its answers are finished, or cut."""
        inbox = self.engine.inbox
        try:
            while not self._finished():
                while not inbox.empty():
                    inbox.get()(self.router)
                if outputs := self.router.step():
                    self.engine.now_delivered(outputs)
                if self.router.idle:
                    self._wait()
        finally:
            self.router.close()
            self.engine.now_ended()

    def _wait(self) -> None:
        """Sleep for a moment, which a message ends at once."""
        with suppress(Empty):
            self.engine.inbox.get(timeout=NAP if self.router.active else LOOK)(self.router)

    def _finished(self) -> bool:
        """Whether to leave; announces the end when it comes near."""
        if self._drains_until is None:
            if not self.shutdown.reason:
                return False
            self._drains_until = time.monotonic() + self.shutdown.grace
            self.engine.now_draining(self.shutdown.reason)
            self.on_drain(self.shutdown.reason)
        idle = not self.router.active and self.engine.inbox.empty()
        return idle or time.monotonic() >= self._drains_until or self.shutdown.deadline.passed
