"""What the ranks say to each other: broadcast, exact all-reduce, all-gather, and agreement about errors."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
from mpi4py import MPI

from mpillama.comm.shared_memory import SPINS, SharedReduction
from mpillama.errors import UserError

T = TypeVar("T")

SPIN_SECONDS = 0.02
"""How long an idle rank polls for the next step before it begins to sleep."""
LONGEST_SLEEP = 0.005
"""The longest nap of an idle rank: what it adds to the first token after a pause."""


class Communicator:
    """The ranks of a run.

    `yields` says that more threads than cores share this host: waits then give the core away instead of spinning.
    `seconds` adds up the time spent in collectives during a step.
    """

    def __init__(self, mpi: MPI.Intracomm, yields: bool = False):
        self.mpi = mpi
        self.rank: int = mpi.rank
        self.size: int = mpi.size
        self.yields = yields
        self.seconds = 0.0
        self.calls = 0
        self.shared: SharedReduction | None = None
        self.shared_limit = 0

    @classmethod
    def alone(cls) -> "Communicator":
        """The communicator of this process only."""
        return cls(MPI.COMM_SELF)

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    # -- the collectives of a step -----------------------------------------------------------------------------------

    def all_reduce(self, partial: np.ndarray) -> np.ndarray:
        """Sum float64 [tokens, width] over ranks, in place, and return it.

        The addends are multiples of 2^-30, so the sum is exact and does not depend on order or number of ranks.
        """
        if self.size > 1:
            start = time.perf_counter()
            if self.shared is not None and partial.size <= self.shared_limit:
                self.shared.all_reduce(partial, 0 if self.yields else SPINS)
            else:
                self._complete(self.mpi.Iallreduce, MPI.IN_PLACE, partial)
            self.seconds += time.perf_counter() - start
            self.calls += 1
        return partial

    def choose_reduction(self, shared: SharedReduction, sizes: list[int]) -> None:
        """Measure the shared-memory reduction against MPI's and use it up to the largest size at which it is faster.

        `sizes`: numbers of float64 values, ascending; all ranks end with rank 0's choice.
        """
        limit = 0
        for size in sizes:
            message = np.zeros(size)
            self.shared, self.shared_limit = None, 0
            seconds = self._median_seconds(message)
            self.shared, self.shared_limit = shared, size
            if self._median_seconds(message) < seconds:
                limit = size
        self.shared_limit = self.broadcast(limit)
        self.seconds, self.calls = 0.0, 0

    def _median_seconds(self, message: np.ndarray, repetitions: int = 15) -> float:
        times = []
        for _ in range(repetitions):
            self.barrier()
            start = time.perf_counter()
            self.all_reduce(message)
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    def all_gather_columns(self, part: np.ndarray, widths: list[int]) -> np.ndarray:
        """Join float32 [rows, widths[rank]] of all ranks along the columns."""
        if self.size == 1:
            return part
        rows = len(part)
        gathered = np.empty(rows * sum(widths), np.float32)
        counts = [rows * width for width in widths]
        with self._timed():
            self._complete(self.mpi.Iallgatherv, np.ascontiguousarray(part), [gathered, counts])
        borders = np.cumsum(counts)[:-1]
        return np.concatenate([p.reshape(rows, -1) for p in np.split(gathered, borders)], axis=1)

    def broadcast_plan(self, plan: np.ndarray) -> None:
        """Give rank 0's step plan to all ranks; they may wait for it for hours, so the wait goes to sleep."""
        if self.size == 1:
            return
        request = self.mpi.Ibcast(plan)
        start, nap = time.perf_counter(), 1e-5
        while not request.Test():
            if time.perf_counter() - start < SPIN_SECONDS:
                self._pause()
            else:
                time.sleep(nap)
                nap = min(2 * nap, LONGEST_SLEEP)

    def _pause(self) -> None:
        if self.yields:
            os.sched_yield()

    def _complete(self, start: Callable[..., MPI.Request], *buffers: Any) -> None:
        """Run a collective to its end."""
        request = start(*buffers)
        if not self.yields:
            request.Wait()
            return
        while not request.Test():
            os.sched_yield()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.calls += 1

    # -- the collectives of start and end ----------------------------------------------------------------------------

    def broadcast(self, value: T) -> T:
        """Give rank 0's object to all ranks."""
        result: T = self.mpi.bcast(value)
        return result

    def gather(self, value: T) -> list[T]:
        """Give every rank's object to all ranks, in order of rank."""
        return self.mpi.allgather(value)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._complete(self.mpi.Ibarrier)

    def neighbours(self) -> "Communicator":
        """Return the communicator of the ranks on this rank's host."""
        return Communicator(cast(MPI.Intracomm, self.mpi.Split_type(MPI.COMM_TYPE_SHARED)), self.yields)

    def together(self, action: Callable[[], T]) -> T:
        """Do what any rank may fail at; if one does, all raise the same UserError (naming the rank, if not all do)."""
        result, mistake = None, None
        try:
            result = action()
        except UserError as error:
            mistake = str(error)
        mistakes = self.gather(mistake)
        if any(m is not None for m in mistakes):
            raise UserError(self._blame(mistakes))
        return result  # type: ignore[return-value]

    def on_root(self, action: Callable[[], T]) -> T:
        """Do it on rank 0 only and give the result to all; a UserError is raised on all."""
        return self.broadcast(self.on_root_only(action))  # type: ignore[return-value]

    def on_root_only(self, action: Callable[[], T]) -> T | None:
        """Do it on rank 0 only, None on the others; a UserError is raised on all."""
        result, mistake = None, None
        if self.is_root:
            try:
                result = action()
            except UserError as error:
                mistake = str(error)
        mistake = self.broadcast(mistake)
        if mistake is not None:
            raise UserError(mistake)
        return result

    def _blame(self, mistakes: list[str | None]) -> str:
        """One sentence for what went wrong on some ranks."""
        rank, sentence = next((i, m) for i, m in enumerate(mistakes) if m is not None)
        others = sum(m is not None for m in mistakes) - 1
        if others + 1 == self.size:
            return sentence
        return f"rank {rank} of {self.size}{f' and {others} more' if others else ''}: {sentence}"
