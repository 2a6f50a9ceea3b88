"""What a model's first rank does when nothing is asked of it: tell the others, which wait for its next step."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

PATIENCE = 0.5
"""Seconds without work before the others are told: most pauses are shorter."""


class Rest:
    """Says that this rank is idle (`idle` is Communicator.idle) after a while of calls of `rest`, until `wake`."""

    def __init__(self, idle: Callable[[], AbstractContextManager[None]], clock: Callable[[], float] = time.monotonic):
        self._idle = idle
        self._clock = clock
        self._since: float | None = None
        self._told: AbstractContextManager[None] | None = None

    def rest(self) -> None:
        """There is nothing to do at the moment."""
        now = self._clock()
        self._since = now if self._since is None else self._since
        if self._told is None and now - self._since >= PATIENCE:
            self._told = self._idle()
            self._told.__enter__()

    def wake(self) -> None:
        """There is work, or the end."""
        told, self._told, self._since = self._told, None, None
        if told is not None:
            told.__exit__(None, None, None)
