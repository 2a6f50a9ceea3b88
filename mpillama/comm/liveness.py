"""Liveness: ranks that have waited long ask others how far they are.

The ranks form a tree, and each speaks only with its parent and its children, so that a look at all costs each rank a
few messages, however many ranks there are. A rank that is silent, or gets no further, is found by its neighbours in the
tree; that somebody gets on elsewhere is passed on along it. Whoever finds a silent neighbour asks a few ranks of other
hosts too: whether the host is gone, or this one is cut off.

A waiting rank polls, so it can also answer; a rank that reads or writes answers now and then (Watch.attend); one that
is stopped, or whose host is gone, does not. Nothing is sent as long as every wait is short.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from mpi4py import MPI

from mpillama.comm.outbox import Outbox

ARITY = 8
"""Children of a rank in the tree: 4,096 ranks are four levels deep."""
FIRST_CALL = 1.0
"""Seconds of waiting before a rank asks for the first time."""
LONGEST_INTERVAL = 15.0
LONGEST_GAP = 1.0
"""A longer pause between two looks was this process's own (the job was suspended): it counts as this much."""
GRACE = 5.0
"""Seconds that the others have for an answer."""
SOON = 0.5
"""Seconds between two messages that pass on that somebody gets on."""
TURN = 0.3
"""Seconds between the verdicts of two children of the same rank."""
MOST_PROBES = 8
"""So many ranks of other hosts, and of a silent rank's, are asked once one is silent."""
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


PASSED_ON = (Kind.IDLE, Kind.BACK, Kind.FAILED, Kind.GONE, Kind.ENDING)
"""What every rank must know, and so hands to its neighbours."""


@dataclass(frozen=True)
class State:
    """How far a rank is: collectives entered, work done, and whether it waits in the last of them.

    Work is counted in bytes, and in looks at a thread that computes: only its growth matters.
    """

    entered: int
    work: int
    waits: bool


@dataclass(frozen=True, order=True)
class Progress:
    """How far a rank was seen to be, wherever it is: news if it is more than was known of that rank."""

    entered: int
    work: int


NO_NEWS = -1, Progress(0, 0)


@dataclass(frozen=True)
class Message:
    """What one rank says to another: of itself, and which rank it last heard to have got on (-1: none)."""

    kind: Kind
    state: State
    news: tuple[int, Progress] = NO_NEWS

    def record(self) -> np.ndarray:
        """As it travels: int64 [7]."""
        (rank, seen), state = self.news, self.state
        numbers = (self.kind, state.entered, state.work, state.waits, rank, seen.entered, seen.work)
        return np.array(numbers, np.int64)

    @classmethod
    def of_record(cls, record: np.ndarray) -> "Message":
        """Read what a rank sent."""
        kind, entered, work, waits, rank, *seen = record.tolist()
        return cls(Kind(kind), State(entered, work, bool(waits)), (rank, Progress(*seen)))


def tree_neighbours(rank: int, size: int) -> list[int]:
    """A rank's parent and children."""
    parent = [] if rank == 0 else [(rank - 1) // ARITY]
    return [*parent, *range(ARITY * rank + 1, min(ARITY * rank + 1 + ARITY, size))]


class Messages:
    """Small messages between ranks, on a communicator of their own; nobody ever waits for one."""

    def __init__(self, mpi: MPI.Intracomm):
        self.mpi = mpi
        self.neighbours = tree_neighbours(mpi.rank, mpi.size)
        self.outbox = Outbox(mpi, self.receive)

    def send(self, to: Iterable[int], message: Message) -> None:
        """Send to some ranks."""
        record = message.record()
        for rank in to:
            self.outbox.keep(self.mpi.Issend(record, rank), record)

    def send_all(self, kind: Kind, state: State, around: Iterable[int] = ()) -> None:
        """Let all ranks know; each that hears it passes it on. It starts beyond `around` too, who may not."""
        beyond = {other for rank in around for other in tree_neighbours(rank, self.mpi.size)}
        self.send(sorted({*self.neighbours, *beyond} - {self.mpi.rank}), self._own(kind, state))

    def _own(self, kind: Kind, state: State) -> Message:
        """Of this rank, through whosever hands it comes."""
        return Message(kind, state, (self.mpi.rank, Progress(state.entered, state.work)))

    def pass_on(self, source: int, message: Message) -> None:
        """Hand on what all ranks must know."""
        self.send([rank for rank in self.neighbours if rank != source], message)

    def receive(self) -> list[tuple[int, Message]]:
        """What has arrived, with the rank that it came from."""
        found, status, record = [], MPI.Status(), np.empty(7, np.int64)
        while self.mpi.Iprobe(status=status):
            self.mpi.Recv(record, status.source)
            found.append((status.source, Message.of_record(record)))
        return found


@dataclass
class Mate:
    """Another rank as it is seen from a waiting one; times in seconds of waiting.

    `asked`: when it was first asked for an answer that has not come. A `probe` is no neighbour: it is asked because one
    is silent.
    """

    rank: int
    state: State | None = None
    answered: float = 0.0
    got_on: float = 0.0
    asked: float | None = None
    probe: bool = False

    def hear(self, state: State, now: float) -> bool:
        """Note an answer; returns whether the rank has got on since the one before."""
        before, self.answered, self.asked = self.state, now, None
        if state == before:
            return False
        self.state, self.got_on = state, now
        return before is not None


class Liveness:
    """One wait of a rank for the others, of whom it asks `mates`.

    Children of one rank find together that it is silent: each leaves the word to those before it, for a turn each.
    """

    def __init__(self, state: State, rank: int, mates: Iterable[int], timeout: float, clock: Callable[[], float]):
        self.state = state
        self.rank = rank
        self.timeout = timeout
        self.turns = {(rank - 1) // ARITY: TURN * ((rank - 1) % ARITY)} if rank else {}
        self.clock = clock
        self.interval = min(timeout / 4, LONGEST_INTERVAL)
        self.grace = min(timeout / 2, GRACE)
        self.mates = {other: Mate(other) for other in mates}
        self.known: dict[int, Progress] = {}
        self.news = NO_NEWS
        self.restart()

    def restart(self) -> None:
        """Begin to wait anew."""
        self.waited, self.seen = 0.0, self.clock()
        self.first_call: float | None = None
        self.next_call = min(self.timeout / 4, FIRST_CALL)
        self.news_heard = self.news_told = 0.0
        for mate in self.mates.values():
            mate.answered = mate.got_on = 0.0
            mate.asked = None

    def pass_time(self) -> None:
        """Count the time since the last look."""
        now = self.clock()
        self.waited += min(now - self.seen, LONGEST_GAP)
        self.seen = now

    # -- what is heard -------------------------------------------------------------------------------------------------

    def hear(self, rank: int, message: Message) -> None:
        """Note what another rank said of itself, and of one that got on."""
        state = message.state
        if (mate := self.mates.get(rank)) is not None and mate.hear(state, self.waited):
            self._note(rank, Progress(state.entered, state.work))
        who, seen = message.news
        if who not in (-1, self.rank):
            self._note(who, seen)

    def _note(self, rank: int, seen: Progress) -> None:
        if rank not in self.known or self.known[rank] < seen:
            self.known[rank] = seen
            self.news, self.news_heard = (rank, seen), self.waited

    # -- what is to be said --------------------------------------------------------------------------------------------

    def to_call(self) -> list[int]:
        """Whom to ask now: nobody before it is time, nobody who has just been heard."""
        if self.waited < self.next_call:
            return []
        self.first_call = self.waited if self.first_call is None else self.first_call
        self.next_call = self.waited + self.interval
        lately = self.waited - self.interval / 2
        found = [m for m in self.mates.values() if m.state is None or m.answered < lately]
        for mate in found:
            mate.asked = self.waited if mate.asked is None else mate.asked
        return [m.rank for m in found]

    def to_tell(self) -> list[int]:
        """Who is to know now that somebody gets on."""
        if self.news_heard <= self.news_told or self.waited < self.news_told + min(SOON, self.interval / 2):
            return []
        self.news_told = self.waited
        return [m.rank for m in self.mates.values() if not m.probe and m.rank != self.news[0]]

    def to_probe(self, hosts: Sequence[str]) -> list[int]:
        """Whom else to ask now, once a neighbour has been silent for a while: ranks of its host, and of others."""
        late = [m for m in self.mates.values() if self._owes_an_answer(m)]
        if not late:
            self.mates = {rank: mate for rank, mate in self.mates.items() if not mate.probe}
        if not late or any(m.probe for m in self.mates.values()):
            return []
        theirs, mine = {hosts[m.rank] for m in late}, hosts[self.rank]
        first = {host: rank for rank, host in reversed([*enumerate(hosts)])}
        others = [rank for host, rank in sorted(first.items(), key=lambda item: item[1]) if host not in {mine, *theirs}]
        others = others[:: max(1, -(-len(others) // MOST_PROBES))]
        beside = [rank for rank, host in enumerate(hosts) if host in theirs][:MOST_PROBES]
        found = [rank for rank in [*beside, *others] if rank != self.rank and rank not in self.mates]
        self.mates |= {rank: Mate(rank, answered=self.waited, got_on=self.waited, probe=True) for rank in found}
        return found

    def _owes_an_answer(self, mate: Mate) -> bool:
        return not mate.probe and mate.asked is not None and self.waited - mate.asked >= self.interval / 2

    # -- what it means -------------------------------------------------------------------------------------------------

    def verdict(self) -> tuple[str, list[Mate]]:
        """Who keeps this rank waiting beyond the time-out, and how: "" as long as somebody gets on.

        "silent" ranks do not answer, "stuck" ones answer but get no further, "elsewhere" ones wait in another
        collective; "all" means that everybody waits in this one. The last two are said a little later: of a rank that
        is silent or stuck its own neighbours know first.
        """
        if self.first_call is None or self.waited < max(self.timeout, self.first_call + self.grace):
            return "", []
        neighbours = [m for m in self.mates.values() if not m.probe]
        overdue = [m for m in neighbours if self.waited - m.got_on >= self.timeout + self.turns.get(m.rank, 0.0)]
        silent = [m for m in overdue if self.waited - m.answered >= max(2 * self.interval, self.grace)]
        stuck = [m for m in overdue if m not in silent and m.state and not m.state.waits]
        if silent:
            return "silent", [*silent, *(m for m in self.mates.values() if m.probe and m.state is None)]
        if stuck:
            return "stuck", stuck
        lately = max([self.news_heard, *(m.got_on for m in neighbours)])
        if len(overdue) < len(neighbours) or self.waited - lately < self.timeout + self.grace:
            return "", []
        elsewhere = [m for m in overdue if m.state and m.state.entered != self.state.entered]
        return ("elsewhere", elsewhere) if elsewhere else ("all", [])

    def answering_hosts(self, hosts: Sequence[str]) -> set[str]:
        """Hosts of whose ranks at least one has been heard in this wait."""
        return {hosts[m.rank] for m in self.mates.values() if m.state is not None and not self._is_lost(m)}

    def _is_lost(self, mate: Mate) -> bool:
        return self.waited - mate.answered >= max(2 * self.interval, self.grace)


@dataclass(frozen=True)
class Place:
    """Where this rank waits, and what it knows: every rank's name and host, and the hosts that have answered."""

    me: int
    collective: str
    names: Sequence[str]
    hosts: Sequence[str]
    answering: set[str]


def describe(verdict: str, mates: Sequence[Mate], place: Place, timeout: float) -> str:
    """The sentence for the user."""
    seconds = f"{timeout:g} s"
    who = place.names[mates[0].rank] + (f" (and {len(mates) - 1} more)" if len(mates) > 1 else "") if mates else ""
    waits = f"{place.names[place.me]} waits for it in {place.collective}"
    reasons = {
        "silent": f"{who} has not answered for {seconds} while {waits}: {_why_silent(mates, place)}",
        "stuck": f"{who} has got no further for {seconds}"
        f"{_work_done(mates)} while {waits}: its host, or the file system there, hangs",
        "elsewhere": f"{who} waits for other ranks elsewhere while {waits}, for {seconds}: that is a bug in mpillama",
        "all": f"all ranks have waited in {place.collective} for {seconds}: MPI does not deliver, so the network may "
        "hang",
    }
    return f"{reasons[verdict]}; all ranks end (--timeout SECONDS waits longer, 0 for ever)."


def _why_silent(silent: Sequence[Mate], place: Place) -> str:
    """What may have struck the silent ranks, as far as the answers of other hosts tell."""
    mine, theirs = place.hosts[place.me], sorted({place.hosts[m.rank] for m in silent})
    lost, others = [host for host in theirs if host not in place.answering], {*place.hosts} - {mine}
    if len(others) > 1 and len(lost) > 1 and not place.answering - {mine}:
        return f"no other host answers {mine} ({', '.join(lost)} were asked), so {mine} is cut off from the network"
    if len(lost) > 1 and mine not in lost:
        return f"the hosts {', '.join(lost)} are down, or cut off from {mine}"
    if lost and mine not in lost and place.answering - {mine}:
        return f"host {lost[0]} is down, hangs or is cut off, or the rank was stopped; other hosts answer"
    if lost and mine not in lost:  # of one rank alone nobody can tell whether it is the rank or its host
        rank = "" if len(silent) > 1 else "it was stopped or is busy beyond measure, or "
        return f"{rank}host {lost[0]} is down or hangs, or the network between it and {mine} is down"
    return "it was stopped, it is busy beyond measure, or its host or the network hangs"


def _work_done(mates: Sequence[Mate]) -> str:
    work = mates[0].state.work if mates and mates[0].state else 0
    return f" (after {work / 1e9:.3f} GB)" if work > MEGABYTE else ""
