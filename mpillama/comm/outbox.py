"""Messages for which nobody waits: kept until they are received, and received before MPI ends."""

import time
from collections.abc import Callable
from typing import ClassVar

from mpi4py import MPI

LOOK_SECONDS = 0.0005
"""Between two looks while the last messages of all ranks find their way."""


class Outbox:
    """What this rank has sent on a communicator of its own.

    It is sent synchronously (MPI_Issend): a request is complete once the receiver has taken the message. `receive`
    takes everything that has arrived for this rank; whatever it returns is not used at the end.
    """

    opened: ClassVar[list["Outbox"]] = []
    """All that may still have messages on their way, in the order in which all their ranks opened them."""

    def __init__(self, mpi: MPI.Intracomm, receive: Callable[[], object]):
        self.mpi = mpi
        self.receive = receive
        self.pending: list[tuple[MPI.Request, object]] = []
        self.opened.append(self)

    def keep(self, request: MPI.Request, message: object = None) -> None:
        """Hold a message until it is received."""
        self.prune()
        self.pending.append((request, message))

    def prune(self) -> None:
        """Forget what has been received."""
        self.pending = [(request, message) for request, message in self.pending if not request.Test()]

    def drain(self) -> None:
        """Receive what is on its way to any rank; all ranks must call this, and send nothing more."""
        barrier: MPI.Request | None = None
        while barrier is None or not barrier.Test():
            self.receive()
            self.prune()
            if barrier is None and not self.pending:
                barrier = self.mpi.Ibarrier()  # complete once every rank's messages have been received
            time.sleep(LOOK_SECONDS)
        self.opened.remove(self)


def drain_all() -> None:
    """Receive every message that nobody has: MPI would tell of each at its end, MPICH's UCX on standard output."""
    for outbox in [*Outbox.opened]:
        outbox.drain()
