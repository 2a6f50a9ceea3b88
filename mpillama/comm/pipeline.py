"""The way of activations through the stages of a model: each holds some layers, and gives their result to the next.

Rank 0 may say what the next steps are before it takes part in them itself: then the stages before its own work on one
while it works on the step before.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from mpi4py import MPI

from mpillama.comm.communicator import PLAN, Communicator, tree_children
from mpillama.comm.hosts import give_up
from mpillama.comm.ways import Traffic

ACTIVATIONS, PLANS = 1, 2
"""The tags of messages: activations, and what a step is."""
WAIT = "the wait for the stage before"


@dataclass(frozen=True)
class Issued:
    """A plan that rank 0 has told the others, and what is under way of it."""

    plan: np.ndarray
    requests: list[MPI.Request]


@dataclass
class Pipeline:
    """A rank's place in a pipeline: `comm` has all ranks, `group` those of its stage, which divide each layer.

    Every rank of a stage holds the residual stream in full, and sends all of it to its partner in the stage after, so
    that no stage has to put it together. `before` and `after` are the partners' ranks in `comm`, None at the ends.
    `seconds` adds up the time that was spent waiting for the stage before, and for the one after to take what it gets.
    Plans of steps go to the `leaders` of the other stages and from each through its stage, along `plans`, on which
    nothing else goes: a step may be told while the one before is computed.
    """

    comm: Communicator
    group: Communicator
    plans: MPI.Intracomm
    leaders: Sequence[int]
    before: int | None
    after: int | None
    seconds: float = 0.0
    sent: Traffic = field(default_factory=Traffic)
    _issued: deque[Issued] = field(default_factory=deque)
    _expected: deque[MPI.Request] = field(default_factory=deque)
    _pending: list[MPI.Request] = field(default_factory=list)

    # -- plans ---------------------------------------------------------------------------------------------------------

    @property
    def stages(self) -> int:
        return 1 + len(self.leaders)

    def issue(self, plan: np.ndarray) -> None:
        """On rank 0 tell the others of a step, for which this rank comes later: it takes its plans in turn."""
        sent = plan.copy()
        requests = [self.comm.mpi.Isend(sent, leader, PLANS) for leader in self.leaders]
        self._issued.append(Issued(sent, [*requests, self.plans.Ibcast(sent)]))
        children = len(self.leaders) + tree_children(self.group.rank, self.group.size)
        self.sent.add(children * sent.nbytes, children)

    def take(self, plan: np.ndarray) -> None:
        """Wait for the next plan; the wait may last for hours, so it goes to sleep."""
        self.comm.watch.enter(PLAN)
        if self.comm.is_root:
            issued = self._issued.popleft()
            plan[:] = issued.plan
            for request in issued.requests:
                self.comm.complete(request)
        else:
            if self.group.is_root:
                self.comm.complete(self.comm.mpi.Irecv(plan, 0, PLANS))
            self.comm.complete(self.plans.Ibcast(plan))
            children = tree_children(self.group.rank, self.group.size)
            self.sent.add(children * plan.nbytes, children)
        self.comm.watch.leave()

    # -- activations ---------------------------------------------------------------------------------------------------

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
        self.plans.Free()
        self.group.mpi.Free()

    def _wait(self, request: MPI.Request, place: str) -> None:
        watch, start = self.comm.watch, time.perf_counter()
        watch.enter(place, of_all=False)  # stages have different numbers of waits
        try:
            self.comm.complete(request)
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
        plans = mpi.Dup()
    group = Communicator(mpi, comm.yields, comm.watch, is_of_all=False)
    before = comm.rank + size if comm.rank + size < comm.size else None
    after = comm.rank - size if comm.rank >= size else None
    return Pipeline(comm, group, plans, range(size, comm.size, size), before, after)
