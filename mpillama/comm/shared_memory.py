"""All-reduce through a window of shared memory on each host, and among the hosts' first ranks."""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from mpi4py import MPI

from mpillama.comm.background import Background, can_be
from mpillama.comm.hosts import HostExchange, Packer, Steps, count_hosts, host_mates, leaders_of
from mpillama.comm.ways import RANKS_PER_HOST, Traffic, ways_between

SPINS = 4000
"""Polls of shared memory before the core is given away: some 100 microseconds."""
POLLING_SECONDS = 0.02
"""How long a rank polls that has its cores to itself: longer than most gaps between steps."""
YIELDING_SECONDS = 0.001
"""How long it gives the core away again and again where a host has more threads than cores."""
SHARE = 1 / 32
"""A nap lasts this share of the wait so far: whoever has waited long is not late by much more."""
LONGEST_NAP = 0.005
"""What a nap may add to the first token after a pause."""


class Backoff:
    """One wait; call `pause` between two polls. `yields`: this host has more threads than cores."""

    def __init__(self, yields: bool = False):
        self.yields = yields
        self._start = time.perf_counter()

    @property
    def spins(self) -> int:
        """How often shared memory is polled before the core is given away."""
        return 0 if self.yields else SPINS

    def pause(self) -> None:
        """Poll on at once, give the core away or sleep, as the wait gets longer."""
        waited = time.perf_counter() - self._start
        if waited >= (YIELDING_SECONDS if self.yields else POLLING_SECONDS):
            time.sleep(min(waited * SHARE, LONGEST_NAP))
        elif self.yields:
            os.sched_yield()


CAPACITY = 1 << 17
"""float64 values that a rank hands over at once (1 MiB); longer messages go in pieces."""
ALIGNMENT = 64
"""Bytes of a cache line."""
TOGETHER = 2
"""Sums that may travel at the same time: the window has as many places for each rank's addends, and for totals."""
YIELDS = 200
"""Times the core is given away before Python looks for signals."""


class Window(Packer, Protocol):
    """What adds up in shared memory: kernels.shared_sum.SharedWindow."""

    def totals_of(self, sequence: int, count: int) -> np.ndarray:
        """Where a host's first rank has the sum of an exchange, float64 [count]."""

    def clear(self) -> None:
        """Begin: once for this rank, before any rank adds up."""

    def sum(self, partial: np.ndarray, sequence: int, posted: bool, spins: int, yields: int) -> bool:
        """Replace `partial` by its sum over ranks; returns whether it was there while it waited."""

    def sum_host(self, count: int, sequence: int, spins: int, yields: int) -> bool:
        """Begin the totals with what this host's ranks have; returns whether they all arrived while it waited."""

    def publish(self, sequence: int) -> None:
        """Give the totals to this host's ranks."""


WindowBytes = Callable[[int, int, bool], int]
"""Of a window: from ranks, capacity, and whether there are several hosts."""
MakeWindow = Callable[[np.ndarray, int, int, int, bool], Window]
"""From memory (uint8), ranks, own rank, capacity, and whether there are several hosts."""


class SharedReduction:
    """The window of this host's ranks, and the number of the last exchange; the same calls must be made on all ranks.

    With several hosts the first rank of each, which `leads`, has an `exchange` with the others'.
    """

    def __init__(self, mpi: MPI.Intracomm, window_bytes: WindowBytes, make_window: MakeWindow, yields: bool = False):
        self.yields = yields
        self.mates = mates = host_mates(mpi)
        self.hosts = count_hosts(mpi, mates)
        size = window_bytes(mates.size, CAPACITY, self.hosts > 1)
        self.window: MPI.Win | None = None
        if mates.size > 1:
            self.window = MPI.Win.Allocate_shared(size if mates.rank == 0 else 0, 1, comm=mates)
            buffer, _ = self.window.Shared_query(0)
            memory = np.asarray(buffer).view(np.uint8).reshape(-1)
        else:
            memory = np.zeros(size + ALIGNMENT, np.uint8)
            memory = memory[-memory.ctypes.data % ALIGNMENT :][:size]
        self.shared = make_window(memory, mates.size, mates.rank, CAPACITY, self.hosts > 1)
        self.shared.clear()
        mates.Barrier()
        self.sequence = 0
        self.traffic = Traffic()
        leaders = leaders_of(mpi, mates) if self.hosts > 1 else None
        pause = lambda: Backoff(yields).pause  # noqa: E731
        self.exchange = HostExchange(leaders, self.shared, CAPACITY, self.traffic, pause) if leaders else None
        self.overlaps = self.hosts > 1 and bool(mpi.allreduce(can_be(), MPI.LAND))
        """Whether a sum can travel while ranks compute what does not need it: MPI lets threads of all ranks send."""
        self._ahead: deque[tuple[int, int]] = deque()
        self._background: Background | None = None

    @property
    def virtual(self) -> bool:
        """Whether hosts are made up, so that MPI's own way, which stays on one machine, is no alternative."""
        return bool(os.environ.get(RANKS_PER_HOST))

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its host."""
        return self.exchange is not None

    @property
    def ways(self) -> list[str]:
        """How hosts may exchange what they have."""
        return ways_between(self.hosts)

    def use(self, table: list[tuple[int, str]]) -> None:
        """Exchange up to so many numbers in that way; the last way is for all that are more."""
        if self.exchange is not None:
            self.exchange.table = table

    def free(self) -> None:
        """Give back what this holds of MPI; all ranks must call this."""
        self._end_background()
        if self.window is not None:
            self.window.Free()
        if self.exchange is not None:
            self.exchange.free()
        self.mates.Free()

    def abandon(self) -> None:
        """Bring no sum any more: the other ranks may never give theirs."""
        self._ahead.clear()
        self._end_background()

    def all_reduce(self, partial: np.ndarray, yields: bool = False, look: Callable[[], None] = lambda: None) -> None:
        """Sum a contiguous float64 array over ranks, in place; `look` is called now and then while it waits."""
        flat = partial.reshape(-1)
        for first in range(0, len(flat), CAPACITY):
            self._exchange(flat[first : first + CAPACITY], Backoff(yields), look)

    def next_sequence(self, counts: Sequence[int]) -> int:
        """The number of the next exchange, of which there is one for each count of numbers."""
        first = self.sequence + 1
        self.sequence += len(counts)
        if self.leads:
            self._ahead += zip(range(first, first + len(counts)), counts, strict=True)
        return first

    def waits(self, backoff: Backoff) -> tuple[int, int]:
        """How often a rank polls for the sum and then gives its core away.

        A leader does neither as long as it must fetch the sum itself, and leaves its core to the thread that does.
        """
        if not self.leads:
            return backoff.spins, YIELDS
        return (0, YIELDS) if self._is_in_background() else (0, 0)

    def hand_over(self) -> None:
        """Let a thread bring the exchanges that were begun, if this rank leads: this rank goes on computing."""
        if self._ahead and self._background is None:
            self._background = Background(self._bring, self.shared.publish, TOGETHER)
        while self._background is not None and self._ahead:
            self._background.give(*self._ahead.popleft())

    def advance(self, backoff: Backoff, look: Callable[[], None]) -> None:
        """Between two polls for the sum: a leader brings one from the other hosts, if its own ranks are there."""
        try:
            look()
        except BaseException:
            self._end_background()
            raise
        if self._is_in_background():
            self.hand_over()  # in the same order on all hosts
        elif self._ahead and self.exchange is not None:
            sequence, count = self._ahead[0]
            if self.shared.sum_host(count, sequence, backoff.spins, YIELDS):
                self.exchange.sum(self.shared.totals_of(sequence, count), look, sequence % TOGETHER)
                self.shared.publish(sequence)
                self._ahead.popleft()
                return
        backoff.pause()

    def _bring(self, sequence: int, count: int) -> Steps:
        """What the thread does of one exchange, but for the publishing."""
        assert self.exchange is not None
        while not self.shared.sum_host(count, sequence, 0, 1):
            yield
        yield from self.exchange.begin(self.shared.totals_of(sequence, count), sequence % TOGETHER)

    def _is_in_background(self) -> bool:
        return self._background is not None and self._background.is_busy

    def _end_background(self) -> None:
        if self._background is not None:
            self._background.end()
            self._background = None

    def _exchange(self, piece: np.ndarray, backoff: Backoff, look: Callable[[], None]) -> None:
        sequence, posted = self.next_sequence([len(piece)]), False
        while not self.shared.sum(piece, sequence, posted, *self.waits(backoff)):
            posted = True  # back in Python, so that signals are seen; then wait on
            self.advance(backoff, look)
