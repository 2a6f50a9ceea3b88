"""Hundreds of waiting ranks in one process, on a clock of their own: who is named, when, and by how many messages."""

from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpillama.comm.liveness import ARITY, Messages, tree_neighbours
from mpillama.comm.outbox import Outbox
from mpillama.comm.watchdog import LOOK_SECONDS, Watch

RANKS = 200
PER_HOST = 4
TIMEOUT = 4.0
HOSTS = [f"n{rank // PER_HOST}" for rank in range(RANKS)]


class Wire:
    """What stands for MPI: every message arrives at once, unless its receiver or a link is gone."""

    def __init__(self) -> None:
        self.queues: list[deque[tuple[int, np.ndarray]]] = [deque() for _ in range(RANKS)]
        self.sent: Counter[int] = Counter()
        self.cut: Callable[[int, int], bool] = lambda one, other: False


class Comm:
    """A rank's view of the wire, as far as Messages uses it."""

    def __init__(self, wire: Wire, rank: int):
        self.wire, self.rank, self.size = wire, rank, RANKS

    def Issend(self, record: np.ndarray, to: int) -> Any:  # noqa: N802 - MPI's name
        self.wire.sent[self.rank] += 1
        if not self.wire.cut(self.rank, to):
            self.wire.queues[to].append((self.rank, record.copy()))
        return self

    def Test(self) -> bool:  # noqa: N802
        return True

    def Iprobe(self, status: Any) -> bool:  # noqa: N802
        if self.wire.queues[self.rank]:
            status.source = self.wire.queues[self.rank][0][0]
        return bool(self.wire.queues[self.rank])

    def Recv(self, record: np.ndarray, source: int) -> None:  # noqa: N802
        record[:] = self.wire.queues[self.rank].popleft()[1]


class Aborter:
    def __init__(self, job: "Job", rank: int):
        self.job, self.rank = job, rank

    def fail(self, text: str) -> None:
        self.job.said.setdefault(self.rank, (self.job.now, text))


class Job:
    """Ranks that all wait in one collective, but for those that something has befallen."""

    def __init__(self) -> None:
        self.now = 0.0
        self.wire = Wire()
        self.said: dict[int, tuple[float, str]] = {}
        self.silent: set[int] = set()
        self.working: set[int] = set()
        self.watches = [self._watch(rank) for rank in range(RANKS)]

    def _watch(self, rank: int) -> Watch:
        watch = Watch(Aborter(self, rank), TIMEOUT)  # type: ignore[arg-type]
        watch.clock = lambda: self.now
        watch.messages = Messages(Comm(self.wire, rank))  # type: ignore[arg-type]
        Outbox.opened.remove(watch.messages.outbox)  # no MPI will end here
        watch.names = [f"rank {rank} of {RANKS} on {host}" for rank, host in enumerate(HOSTS)]
        watch.hosts = HOSTS
        return watch

    def wait(self, seconds: float) -> None:
        """Let all ranks wait, until one of them ends the job; those that work get on and answer."""
        for rank, watch in enumerate(self.watches):
            if rank not in self.working:
                watch.enter("a sum")
        end = self.now + seconds
        while self.now < end and not self.said:
            self.now += LOOK_SECONDS
            for rank in {*range(RANKS)} - self.silent:
                if rank in self.working:
                    self.watches[rank].work += 1
                    self.watches[rank].answer()
                else:
                    self.watches[rank].poll()


@pytest.mark.parametrize("victim", [0, 3, 17, RANKS - 1])
def test_a_silent_rank_is_named_in_time_by_few_messages(victim: int) -> None:
    job = Job()
    job.silent = {victim}
    job.wait(3 * TIMEOUT)
    (speaker, (when, text)), *others = job.said.items()
    assert speaker in tree_neighbours(victim, RANKS)
    assert f"rank {victim} of {RANKS} on {HOSTS[victim]} has not answered for 4 s" in text
    assert TIMEOUT <= when <= TIMEOUT + 1.5
    assert len(others) <= 1
    calls = 1 + TIMEOUT / (TIMEOUT / 4)
    assert max(job.wire.sent.values()) <= calls * 2 * (ARITY + 1) + 2 * ARITY + 8
    assert sum(job.wire.sent.values()) <= calls * 2 * 2 * RANKS


def test_a_lost_host_is_told_from_a_lost_rank() -> None:
    job = Job()
    job.silent = {rank for rank, host in enumerate(HOSTS) if host == "n30"}
    job.wait(3 * TIMEOUT)
    (_, (when, text)), *_ = job.said.items()
    assert "host n30 is down, hangs or is cut off, or the rank was stopped; other hosts answer" in text
    assert when <= TIMEOUT + 1.5


def test_a_host_that_is_cut_off_says_so_itself() -> None:
    job = Job()
    job.wire.cut = lambda one, other: (HOSTS[one] == "n30") != (HOSTS[other] == "n30")
    job.wait(TIMEOUT + 2)
    for _ in range(25):  # the ranks beyond the cut do not know that others have ended
        job.now += LOOK_SECONDS
        for watch in job.watches:
            watch.poll()
    cut_off = [text for rank, (_, text) in job.said.items() if HOSTS[rank] == "n30"]
    others = [text for rank, (_, text) in job.said.items() if HOSTS[rank] != "n30"]
    assert cut_off
    assert others
    assert all("so n30 is cut off from the network" in text for text in cut_off)
    assert all("on n30" in text and "other hosts answer" in text for text in others)


@pytest.mark.parametrize("worker", [0, 5, RANKS - 1])
def test_a_rank_that_works_keeps_all_others_waiting(worker: int) -> None:
    """However far away it is in the tree."""
    job = Job()
    job.working = {worker}
    job.wait(3 * TIMEOUT)
    assert job.said == {}
