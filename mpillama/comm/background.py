"""A thread that brings sums from the other hosts, while this rank's own threads compute."""

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from mpi4py import MPI

from mpillama.comm.hosts import Steps

NAP = 1e-4
"""Seconds between two polls: the cores belong to those who compute. A fifth of it cost them more than it gained."""


def can_be() -> bool:
    """Whether MPI lets a thread send and receive beside the main thread."""
    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


class Background(threading.Thread):
    """Brings sums in the order in which they are given, up to `together` at the same time; starts at once.

    `bring` gets the number of an exchange and how many numbers it has, and brings it a little at a time. Its end is
    what the others see: it comes in order, so that a sum that is there early waits for the ones before.
    """

    def __init__(self, bring: Callable[[int, int], Steps], publish: Callable[[int], None], together: int):
        super().__init__(daemon=True, name="sums between hosts")
        self._bring = bring
        self._publish = publish
        self._together = together
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
        under_way: deque[tuple[int, Steps]] = deque()
        try:
            while self._take(under_way):
                arrived = [next(steps, self) is self for _, steps in under_way]
                while arrived and arrived.pop(0):
                    self._publish(under_way.popleft()[0])
                    self._brought += 1
                if under_way:
                    time.sleep(NAP)
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self._error = error
        while under_way:
            under_way.pop()[1].close()

    def _take(self, under_way: deque[tuple[int, Steps]]) -> bool:
        """Begin what was given, as far as may travel together; waits if nothing does. False at the end."""
        while len(under_way) < self._together and not self._ending:
            if under_way and self._tasks.empty():
                break
            if task := self._tasks.get():
                under_way.append((task[0], self._bring(*task)))
        return not self._ending
