"""Groups of ranks that each hold a whole model: split, and what they tell each other outside all collectives."""

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from mpi4py import MPI

from mpillama.comm.communicator import Communicator
from mpillama.comm.roll_call import Messages
from mpillama.comm.watchdog import Watch
from mpillama.errors import UserError

if TYPE_CHECKING:
    from mpillama.comm.start import World

BEAT_SECONDS = 5.0
"""The longest time between two signs of life; several must come within the job's time-out."""


def split_world(world: "World", size: int) -> "World":
    """The world of this rank's group: ranks 0 to size - 1 are the first, and so on; UserError if that leaves a rest."""
    whole = world.comm
    if size < 1 or whole.size % size:
        raise UserError(f"--tensor-parallel is {size}: {whole.size} ranks do not divide into groups of that size.")
    group = whole.rank // size
    with whole.watch.blocking("the start"):
        mpi = cast(MPI.Intracomm, whole.mpi.Split(group, whole.rank))
        watch = Watch(whole.watch.aborter, whole.watch.timeout)
        watch.messages = Messages(mpi.Dup()) if size > 1 else None
    watch.display = whole.watch.display
    watch.names = whole.watch.names[group * size : (group + 1) * size]
    comm = Communicator(mpi, whole.yields, watch)
    return replace(world, comm=comm, neighbours=comm.neighbours())


class Post:
    """Objects from rank to rank of the whole job; nobody ever waits for one.

    A rank shows those that it greets that it is alive, and expects to hear of others: silence beyond the job's time-out
    ends it.
    """

    def __init__(self, comm: Communicator):
        with comm.watch.blocking("the start"):
            self._mpi = comm.mpi.Dup()
        self._watch = comm.watch
        self._beat = min(BEAT_SECONDS, comm.watch.timeout / 4) if comm.watch.timeout else BEAT_SECONDS
        self._sent: list[MPI.Request] = []
        self._greeted: set[int] = set()
        self._heard: dict[int, float] = {}
        self._beaten = 0.0

    def greet(self, rank: int) -> None:
        """From now on let that rank hear of this one."""
        self._greeted.add(rank)

    def expect(self, rank: int) -> None:
        """From now on that rank must be heard of."""
        self._heard[rank] = time.monotonic()

    def forget(self, rank: int) -> None:
        """That rank may be silent."""
        self._heard.pop(rank, None)

    def send(self, to: int, value: Any) -> None:
        """Send an object."""
        self._sent = [request for request in self._sent if not request.Test()]
        self._sent.append(self._mpi.isend(value, to))

    def receive(self) -> list[tuple[int, Any]]:
        """What has arrived: rank and object."""
        found, status = [], MPI.Status()
        while self._mpi.iprobe(status=status):
            rank = status.source
            value = self._mpi.recv(source=rank)
            if rank in self._heard:
                self._heard[rank] = time.monotonic()
            if value is not None:
                found.append((rank, value))
        return found

    def live(self) -> None:
        """Show that this rank is alive, and end the job if one that is expected has been silent too long."""
        now = time.monotonic()
        if now - self._beaten < self._beat:
            return
        own_pause, self._beaten = now - self._beaten > 2 * self._beat, now
        for rank in self._greeted:
            self.send(rank, None)
        for rank, heard in self._heard.items():
            if own_pause:  # this rank was long in a step: it has not listened meanwhile
                self._heard[rank] = now
            elif self._watch.timeout and now - heard > self._watch.timeout:
                name = self._watch.names[rank]
                self._watch.strike(
                    f"{name} has not been heard of for {self._watch.timeout:g} s: it was stopped, or its host or the "
                    "network hangs; all ranks end (--timeout SECONDS waits longer, 0 for ever)."
                )

    def wait(self, seconds: float = 0.002) -> None:
        """Give the core away for a moment, and live."""
        os.sched_yield()
        time.sleep(seconds)
        self.live()
