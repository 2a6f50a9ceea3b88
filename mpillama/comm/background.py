"""A thread that brings sums from the other hosts, while this rank's own threads compute."""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from mpi4py import MPI

NAP = 2e-5
"""Seconds between two polls: the cores belong to those who compute."""
Look = Callable[[], None]


def can_be() -> bool:
    """Whether MPI lets a thread send and receive beside the main thread."""
    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


class EndedError(Exception):
    """The thread was to end before a sum was there."""


class Background(threading.Thread):
    """Brings one sum after the other, in the order in which they are given; starts at once.

    `bring` gets the number of an exchange, how many numbers it has, and what to call between two polls.
    """

    def __init__(self, bring: Callable[[int, int, Look], None]):
        super().__init__(daemon=True, name="sums between hosts")
        self._bring = bring
        self._tasks: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        self._given = self._brought = 0
        self._ending = False
        self._error: BaseException | None = None
        self.start()

    def give(self, sequence: int, count: int) -> None:
        """Bring this one, too."""
        self._given += 1
        self._tasks.put((sequence, count))

    @property
    def is_busy(self) -> bool:
        """Whether something that was given is not there yet; raises what went wrong."""
        if self._error is not None:
            raise self._error
        return self._brought < self._given

    def end(self) -> None:
        """Wait until the thread is gone, which brings nothing more."""
        self._ending = True
        self._tasks.put(None)
        self.join()

    def run(self) -> None:
        """Work until the end."""
        try:
            while task := self._tasks.get():
                self._bring(*task, self._look)
                self._brought += 1
        except EndedError:
            return
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self._error = error

    def _look(self) -> None:
        if self._ending:
            raise EndedError
        time.sleep(NAP)
