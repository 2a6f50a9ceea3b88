"""The way of activations through the stages of a model: each holds some layers, and gives their result to the next."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from mpi4py import MPI

from mpillama.comm.communicator import Communicator
from mpillama.comm.hosts import give_up
from mpillama.comm.shared_memory import Backoff
from mpillama.comm.ways import Traffic

ACTIVATIONS = 1
"""The tag of their messages."""
WAIT = "the wait for the stage before"


@dataclass
class Pipeline:
    """A rank's place in a pipeline: `comm` has all ranks, `group` those of its stage, which divide each layer.

    Every rank of a stage holds the residual stream in full, and sends all of it to its partner in the stage after, so
    that no stage has to put it together. `before` and `after` are the partners' ranks in `comm`, None at the ends.
    `seconds` adds up the time that was spent waiting for the stage before, and for the one after to take what it gets.
    """

    comm: Communicator
    group: Communicator
    before: int | None
    after: int | None
    seconds: float = 0.0
    sent: Traffic = field(default_factory=Traffic)
    _expected: deque[MPI.Request] = field(default_factory=deque)
    _pending: list[MPI.Request] = field(default_factory=list)

    def expect(self, pieces: Sequence[np.ndarray]) -> None:
        """Say where the parts of a step's activations go, in the order in which they come; nothing for stage 0."""
        if self.before is not None:
            self._expected.extend(self.comm.mpi.Irecv(piece, self.before, ACTIVATIONS) for piece in pieces)

    def receive(self) -> None:
        """Wait for the next part; nothing for stage 0."""
        if self._expected:
            self._wait(self._expected.popleft(), WAIT)

    def send(self, piece: np.ndarray) -> None:
        """Give a part to the stage after, if there is one; it must stay as it is until `finish`."""
        if self.after is not None:
            self._pending.append(self.comm.mpi.Isend(piece, self.after, ACTIVATIONS))
            self.sent.add(piece.nbytes)

    def finish(self) -> None:
        """Wait until the stage after has got everything."""
        for request in self._pending:
            self._wait(request, "the wait for the stage after")
        self._pending.clear()

    def forget_costs(self) -> None:
        """Begin anew to count what this rank waits and sends."""
        self.seconds, self.sent = 0.0, Traffic()
        self.comm.forget_costs()

    def free(self) -> None:
        """Give back what the stage holds of MPI; all ranks must call this, with nothing under way."""
        if self.group.shared is not None:
            self.group.shared.free()
            self.group.shared = None
        self.group.mpi.Free()

    def _wait(self, request: MPI.Request, place: str) -> None:
        watch, start, backoff = self.comm.watch, time.perf_counter(), Backoff(self.comm.yields)
        watch.enter(place, of_all=False)  # stages have different numbers of waits
        try:
            while not request.Test():
                backoff.pause()
                watch.poll()
        except BaseException:
            give_up([request, *self._expected] if place == WAIT else self._expected)
            self._expected.clear()
            raise
        watch.leave()
        self.seconds += time.perf_counter() - start


def join_stages(comm: Communicator, stages: int) -> Pipeline:
    """Divide ranks into stages of neighbours: the last ranks are the first stage. All ranks must call this."""
    size = comm.size // stages
    number, place = divmod(comm.rank, size)
    with comm.watch.blocking("the start"):
        mpi = cast(MPI.Intracomm, comm.mpi.Split(number, place))
    group = Communicator(mpi, comm.yields, comm.watch, is_of_all=False)
    before = comm.rank + size if comm.rank + size < comm.size else None
    after = comm.rank - size if comm.rank >= size else None
    return Pipeline(comm, group, before, after)
