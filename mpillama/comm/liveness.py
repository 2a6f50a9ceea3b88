"""Liveness: ranks that have waited long ask the others how far they are.

A waiting rank polls, so it can also answer; a rank that reads or writes answers now and then (Watch.attend); one that
is stopped, or whose host is gone, does not. Nothing is sent as long as every wait is short.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from mpi4py import MPI

FIRST_CALL = 1.0
"""Seconds of waiting before a rank asks for the first time."""
LONGEST_INTERVAL = 15.0
LONGEST_GAP = 1.0
"""A longer pause between two looks was this process's own (the job was suspended): it counts as this much."""
GRACE = 5.0
"""Seconds that the others have for an answer."""
MEGABYTE = 10**6
"""Less work is not worth telling, and may not have been bytes."""


class Kind(IntEnum):
    """What a message says.

    Asking, answering; that rank 0 may be silent because it waits for a person; that the ranks' common task cannot
    succeed; that a rank has given up; that a rank ends the job and has said why.
    """

    CALL = 1
    HERE = 2
    IDLE = 3
    BACK = 4
    FAILED = 5
    GONE = 6
    ENDING = 7


@dataclass(frozen=True)
class State:
    """How far a rank is: collectives entered, work done, and whether it waits in the last of them.

    Work is counted in bytes, and in looks at a thread that computes: only its growth matters.
    """

    entered: int
    work: int
    waits: bool


class Messages:
    """Small messages between all ranks, on a communicator of their own; nobody ever waits for one."""

    def __init__(self, mpi: MPI.Intracomm):
        self.mpi = mpi
        self.sent: list[tuple[MPI.Request, np.ndarray]] = []

    def send(self, to: int, kind: Kind, state: State) -> None:
        message = np.array([kind, state.entered, state.work, state.waits], np.int64)
        self.sent = [(request, buffer) for request, buffer in self.sent if not request.Test()]
        self.sent.append((self.mpi.Isend(message, to), message))

    def send_all(self, kind: Kind, state: State) -> None:
        for rank in range(self.mpi.size):
            if rank != self.mpi.rank:
                self.send(rank, kind, state)

    def receive(self) -> list[tuple[int, Kind, State]]:
        """What has arrived: rank, kind, state."""
        found, status, message = [], MPI.Status(), np.empty(4, np.int64)
        while self.mpi.Iprobe(status=status):
            self.mpi.Recv(message, status.source)
            found.append((status.source, Kind(message[0]), State(int(message[1]), int(message[2]), bool(message[3]))))
        return found


@dataclass
class Mate:
    """Another rank as it is seen from a waiting one; times in seconds of waiting."""

    rank: int
    state: State | None = None
    answered: float = 0.0
    got_on: float = 0.0

    def hear(self, state: State, now: float) -> None:
        """Note an answer."""
        self.answered = now
        if state != self.state:
            self.state, self.got_on = state, now


class Liveness:
    """One wait of a rank for the others."""

    def __init__(self, state: State, rank: int, size: int, timeout: float, clock: Callable[[], float]):
        self.state = state
        self.rank = rank
        self.timeout = timeout
        self.clock = clock
        self.interval = min(timeout / 4, LONGEST_INTERVAL)
        self.next_call = min(timeout / 4, FIRST_CALL)
        self.mates = {other: Mate(other) for other in range(size) if other != rank}
        self.restart()

    def restart(self) -> None:
        """Begin to wait anew."""
        self.waited, self.seen = 0.0, self.clock()
        self.first_call: float | None = None
        self.next_call = min(self.timeout / 4, FIRST_CALL)
        for mate in self.mates.values():
            mate.answered = mate.got_on = 0.0

    def pass_time(self) -> None:
        """Count the time since the last look."""
        now = self.clock()
        self.waited += min(now - self.seen, LONGEST_GAP)
        self.seen = now

    def hear(self, rank: int, kind: Kind, state: State) -> None:
        """Note what another rank said; a lower rank in the same collective does the asking for both."""
        self.mates[rank].hear(state, self.waited)
        if kind is Kind.CALL and rank < self.rank and state.waits and state.entered == self.state.entered:
            self.next_call = self.waited + 2 * self.interval
            self.first_call = None

    def is_time_to_call(self) -> bool:
        """Whether to ask all others now."""
        if self.waited < self.next_call:
            return False
        self.first_call = self.waited if self.first_call is None else self.first_call
        self.next_call = self.waited + self.interval
        return True

    def verdict(self) -> tuple[str, list[Mate]]:
        """Who keeps this rank waiting beyond the time-out, and how: "" as long as somebody gets on.

        "silent" ranks do not answer, "stuck" ones answer but get no further, "elsewhere" ones wait in another
        collective; "all" means that everybody waits in this one.
        """
        grace = min(self.timeout / 2, GRACE)
        if self.waited < self.timeout or self.first_call is None or self.waited < self.first_call + grace:
            return "", []
        overdue = [m for m in self.mates.values() if self.waited - m.got_on >= self.timeout]
        silent = [m for m in overdue if self.waited - m.answered >= max(2 * self.interval, grace)]
        stuck = [m for m in overdue if m not in silent and m.state and not m.state.waits]
        if silent or stuck:
            return ("silent", silent) if silent else ("stuck", stuck)
        if len(overdue) < len(self.mates):
            return "", []
        elsewhere = [m for m in overdue if m.state and m.state.entered != self.state.entered]
        return ("elsewhere", elsewhere) if elsewhere else ("all", [])


def describe(verdict: str, mates: Sequence[Mate], names: Sequence[str], place: str, me: int, timeout: float) -> str:
    """The sentence for the user; `names` describe the ranks, `place` is the collective."""
    seconds = f"{timeout:g} s"
    who = names[mates[0].rank] + (f" (and {len(mates) - 1} more)" if len(mates) > 1 else "") if mates else ""
    waits = f"{names[me]} waits for it in {place}"
    reasons = {
        "silent": f"{who} has not answered for {seconds} while {waits}: it was stopped, it is busy beyond measure, or "
        "its host or the network hangs",
        "stuck": f"{who} has got no further for {seconds}"
        f"{_work_done(mates)} while {waits}: its host, or the file system there, hangs",
        "elsewhere": f"{who} waits for other ranks elsewhere while {waits}, for {seconds}: that is a bug in mpillama",
        "all": f"all ranks have waited in {place} for {seconds}: MPI does not deliver, so the network may hang",
    }
    return f"{reasons[verdict]}; all ranks end (--timeout SECONDS waits longer, 0 for ever)."


def _work_done(mates: Sequence[Mate]) -> str:
    work = mates[0].state.work if mates and mates[0].state else 0
    return f" (after {work / 1e9:.3f} GB)" if work > MEGABYTE else ""


def monotonic() -> float:
    return time.perf_counter()
