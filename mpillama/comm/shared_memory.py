"""All-reduce among ranks of one host through a window of shared memory."""

import os
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
from mpi4py import MPI

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
YIELDS = 200
"""Times the core is given away before Python looks for signals."""


class Window(Protocol):
    """What adds up in shared memory: kernels.shared_sum.SharedWindow."""

    def clear(self) -> None:
        """Begin: once for this rank, before any rank adds up."""

    def sum(self, partial: np.ndarray, sequence: int, posted: bool, spins: int, yields: int) -> bool:
        """Replace `partial` by its sum over ranks; returns whether all ranks arrived while it waited."""


MakeWindow = Callable[[np.ndarray, int, int, int], Window]
"""From memory (uint8), ranks, own rank and capacity."""


class SharedReduction:
    """The window, and the number of the last exchange; the same calls must be made on all ranks."""

    def __init__(self, mpi: MPI.Intracomm, window_bytes: Callable[[int, int], int], make_window: MakeWindow):
        size = window_bytes(mpi.size, CAPACITY)
        self.window = MPI.Win.Allocate_shared(size if mpi.rank == 0 else 0, 1, comm=mpi)
        buffer, _ = self.window.Shared_query(0)
        memory = np.asarray(buffer).view(np.uint8).reshape(-1)
        self.shared = make_window(memory, mpi.size, mpi.rank, CAPACITY)
        self.shared.clear()
        mpi.Barrier()
        self.sequence = 0

    def all_reduce(self, partial: np.ndarray, yields: bool = False, look: Callable[[], None] = lambda: None) -> None:
        """Sum a contiguous float64 array over ranks, in place; `look` is called now and then while it waits."""
        flat = partial.reshape(-1)
        for first in range(0, len(flat), CAPACITY):
            self._exchange(flat[first : first + CAPACITY], Backoff(yields), look)

    def next_sequence(self, exchanges: int = 1) -> int:
        """The number of the next exchange, of which so many follow."""
        first = self.sequence + 1
        self.sequence += exchanges
        return first

    def _exchange(self, piece: np.ndarray, backoff: Backoff, look: Callable[[], None]) -> None:
        sequence, posted = self.next_sequence(), False
        while not self.shared.sum(piece, sequence, posted, backoff.spins, YIELDS):
            posted = True  # back in Python, so that signals are seen; then wait on
            look()
            backoff.pause()
