"""While threads read a rank's weights, its main thread tells all ranks how far it is, and hears of failures."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np

from mpillama.comm.communicator import Communicator, Rounds
from mpillama.errors import UserError

INTERVAL = 0.1
"""Seconds between a busy rank's looks at the others."""
LONGEST_NAP = 0.005
"""Of a rank that waits for the others, in seconds."""
PLACE = "the end of loading"
LOG_INTERVAL = 30.0
"""Seconds between rank 0's log lines."""


class State(IntEnum):
    """What a rank is doing."""

    READING = 0
    DONE = 1
    FAILED = 2


@dataclass(frozen=True)
class LoadState:
    """How far all ranks are, in bytes of the file; a rank that has nothing to read is done."""

    read: np.ndarray
    totals: np.ndarray
    hosts: Sequence[str]

    @property
    def slowest(self) -> str:
        """The rank that has the largest share still to read, as a person finds it."""
        shares = np.minimum(self.read / np.maximum(self.totals, 1), 1.0)
        shares[self.totals == 0] = 1.0
        rank = int(np.argmin(shares))
        return f"rank {rank} on {self.hosts[rank]}, {100 * shares[rank]:.0f} %"


class Source(Protocol):
    """What a rank's weights come from: counts the bytes that have come, and can be told to stop."""

    @property
    def bytes_read(self) -> int:
        """So far."""

    def stop(self) -> None:
        """Make reads that are under way end soon."""


class AbandonedError(Exception):
    """Another rank failed: there is nothing to load for."""


class LoadWatch:
    """Attends the reading of one rank; `show` is told of every round on rank 0."""

    def __init__(
        self, comm: Communicator, hosts: Sequence[str], reader: Source, total: int,
        show: Callable[[LoadState], None],
    ):  # fmt: skip
        self.comm = comm
        self.hosts = hosts
        self.reader = reader
        self.total = total
        self.show = show
        self.rounds = Rounds(comm)
        self.logged = time.monotonic()
        self.waits = False
        self.began = comm.watch.entered

    def attend(self, tasks: Sequence[Future[None]]) -> None:
        """Return when all ranks have done their tasks; without tasks, show the others that this rank is alive.

        Once any rank fails, all leave soon: it raises what failed there, the others raise AbandonedError.
        """
        if not tasks:
            self.comm.attend()
            return
        try:
            self._attend(tasks)
        finally:
            if self.waits:
                self.comm.watch.leave()

    def _attend(self, tasks: Sequence[Future[None]]) -> None:
        pending, nap = set(tasks), INTERVAL / 1000
        failure: BaseException | None = None
        while True:
            done, pending = wait(pending, INTERVAL, FIRST_EXCEPTION) if pending else (set(), pending)
            failure = failure or self._failure(done)
            self._live(bool(pending))
            heard = self.rounds.exchange(self._news(bool(pending), failure))
            if heard is not None:
                self._tell(heard)
                if (heard[:, 0] == State.FAILED).any():
                    self.reader.stop()
                    raise failure or AbandonedError
                if (heard[:, 0] == State.DONE).all():
                    self.rounds.mpi.Free()
                    return
            elif not pending:
                time.sleep(nap)
                nap = min(2 * nap, LONGEST_NAP)

    def _live(self, reading: bool) -> None:
        """Answer the others; a rank that has read its part watches the rest."""
        if reading:
            self.comm.watch.work = self.reader.bytes_read
            self.comm.attend()
        elif self.waits:
            self.comm.watch.poll()
            if self.comm.watch.failed_at >= self.began:  # of what a round does not tell, as too little memory
                raise AbandonedError
        else:
            self.waits = True
            self.comm.watch.enter(PLACE)

    def _failure(self, done: set[Future[None]]) -> BaseException | None:
        """What a task failed with, if any; a failure of the program is raised here, which ends all ranks."""
        failures = [error for task in done if (error := task.exception()) is not None]
        for error in failures:
            if not isinstance(error, UserError):
                raise error
        if failures:
            self.reader.stop()
        return failures[0] if failures else None

    def _news(self, reading: bool, failure: BaseException | None) -> np.ndarray:
        state = State.FAILED if failure else State.READING if reading else State.DONE
        return np.array([state, self.reader.bytes_read, self.total], np.int64)

    def _tell(self, heard: np.ndarray) -> None:
        if not self.comm.is_root:
            return
        state = LoadState(heard[:, 1], heard[:, 2], self.hosts)
        self.show(state)
        if time.monotonic() - self.logged > LOG_INTERVAL:
            self.logged = time.monotonic()
            read, total = int(state.read.sum()), int(state.totals.sum())
            logging.getLogger(__name__).info(
                "read %.1f of %.1f GB, slowest: %s.", read / 1e9, total / 1e9, state.slowest
            )
