"""Objects from rank to rank outside all collectives, and heartbeats."""

import os
import time
from typing import Any

from mpi4py import MPI

from mpillama.comm.communicator import Communicator
from mpillama.comm.outbox import Outbox

BEAT_SECONDS = 5.0
"""The longest time between two heartbeats; several must come within the job's time-out."""


class Mailbox:
    """Objects from rank to rank of the whole job; nobody ever blocks on one.

    A rank sends heartbeats where it was told to (`beat_to`), and ends the job if one that it watches is silent for
    longer than the job's time-out.
    """

    def __init__(self, comm: Communicator):
        with comm.watch.blocking("the start"):
            self._mpi = comm.mpi.Dup()
        self._outbox = Outbox(self._mpi, self.receive)
        self.size = comm.size
        self._watchdog = comm.watch
        self._period = min(BEAT_SECONDS, comm.watch.timeout / 4) if comm.watch.timeout else BEAT_SECONDS
        self._beats_to: set[int] = set()
        self._heard: dict[int, float] = {}
        self._last_beat = 0.0

    def beat_to(self, rank: int) -> None:
        self._beats_to.add(rank)

    def watch(self, rank: int) -> None:
        self._heard[rank] = time.monotonic()

    def unwatch(self, rank: int) -> None:
        self._heard.pop(rank, None)

    def send(self, to: int, value: Any) -> None:
        self._outbox.keep(self._mpi.issend(value, to))

    def receive(self) -> list[tuple[int, Any]]:
        """Everything that has arrived: the sender's rank and the object."""
        found, status = [], MPI.Status()
        while self._mpi.iprobe(status=status):
            rank = status.source
            value = self._mpi.recv(source=rank)
            if rank in self._heard:
                self._heard[rank] = time.monotonic()
            if value is not None:
                found.append((rank, value))
        return found

    def beat(self) -> None:
        """Send heartbeats if it is time to, and end the job if a watched rank has been silent for too long."""
        now = time.monotonic()
        if now - self._last_beat < self._period:
            return
        own_pause, self._last_beat = now - self._last_beat > 2 * self._period, now
        for rank in self._beats_to:
            self.send(rank, None)
        for rank, heard in self._heard.items():
            timeout = self._watchdog.timeout
            if own_pause:  # this rank was in a long step and has not listened meanwhile
                self._heard[rank] = now
            elif timeout and now - heard > timeout:
                self._watchdog.abort(
                    f"{self._watchdog.names[rank]} has not been heard of for {timeout:g} s: it was stopped, or its "
                    "host or the network hangs; all ranks end (--timeout SECONDS waits longer, 0 for ever)."
                )

    def wait(self, seconds: float = 0.002) -> None:
        """Give the core away for a moment, and beat."""
        os.sched_yield()
        time.sleep(seconds)
        self.beat()
