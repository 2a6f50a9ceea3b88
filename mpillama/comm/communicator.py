"""What the ranks say to each other: broadcast, exact all-reduce, all-gather, and agreement about errors."""

import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import numpy as np
from mpi4py import MPI

from mpillama.comm.failure import out_of_memory
from mpillama.comm.shared_memory import Backoff, SharedReduction
from mpillama.comm.watchdog import OthersFailedError, Watch, do_in_thread
from mpillama.comm.ways import Traffic
from mpillama.errors import UserError

T = TypeVar("T")

MESSAGE_BYTES = 16 << 20
"""Of a large broadcast: well below what MPI counts in 32 bits."""
ALL_REDUCE = "the sum over ranks (all-reduce) of a step"
LARGEST_COUNT = 1 << 30
"""Numbers that one message holds: counts of MPI before version 4 have 32 bits."""
TIMING_SECONDS = 0.3
"""How long one way of adding up is timed at the start."""
PLAN = "the wait for rank 0's next step"


class Communicator:
    """The ranks of a run.

    `yields` says that more threads than cores share this host: waits then give the core away instead of spinning.
    `seconds` adds up the time spent in collectives during a step, `sent` what this rank sent in them. `watch` sees that
    no wait lasts for ever, and counts the collectives of all ranks together (`is_of_all`), which every rank must enter
    alike.
    """

    def __init__(self, mpi: MPI.Intracomm, yields: bool = False, watch: Watch | None = None, is_of_all: bool = True):
        self.mpi = mpi
        self.rank: int = mpi.rank
        self.size: int = mpi.size
        self.yields = yields
        self.watch = Watch() if watch is None else watch
        self.is_of_all = is_of_all
        self.seconds = 0.0
        self.calls = 0
        self._sent = Traffic()
        self.shared: SharedReduction | None = None
        self.shared_limit = 0
        self.largest_count = LARGEST_COUNT

    @classmethod
    def alone(cls) -> "Communicator":
        """The communicator of this process only."""
        return cls(MPI.COMM_SELF)

    def free(self) -> None:
        """Give back what this communicator holds of MPI; all ranks must call this, with nothing under way."""
        if self.watch.messages is not None:
            self.watch.messages.outbox.drain()
            self.watch.messages.mpi.Free()
            self.watch.messages = None
        self.free_sums()

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    # -- the collectives of a step -----------------------------------------------------------------------------------

    def all_reduce(self, partial: np.ndarray) -> np.ndarray:
        """Sum float64 [tokens, width] over ranks, in place, and return it.

        The addends are multiples of 2^-30, so the sum is exact and does not depend on order or number of ranks.
        """
        if self.size > 1:
            start = time.perf_counter()
            if shared := self.shared_for(partial.size):
                self.watch.enter(ALL_REDUCE, self.is_of_all)
                shared.all_reduce(partial, self.yields, self.watch.poll)
                self.watch.leave()
            else:
                self._all_reduce_by_mpi(partial.reshape(-1))
            self.seconds += time.perf_counter() - start
            self.calls += 1
        return partial

    def shared_for(self, count: int) -> SharedReduction | None:
        """The memory through which the ranks add up so many float64, if they do it so."""
        return self.shared if self.shared is not None and count <= self.shared_limit else None

    def finish_all_reduce(self, shared: SharedReduction, done: bool, waited: float, go_on: Callable[[], bool]) -> None:
        """Wait for an all-reduce that began in the kernels and waited there for so many seconds; `go_on` ends it."""
        start = time.perf_counter()
        self.watch.enter(ALL_REDUCE, self.is_of_all)
        backoff = Backoff(self.yields)
        while not done:
            shared.advance(backoff, self.watch.poll)
            done = go_on()
        self.watch.leave()
        self.seconds += waited + time.perf_counter() - start
        self.calls += 1

    def _all_reduce_by_mpi(self, flat: np.ndarray) -> None:
        for first in range(0, len(flat), self.largest_count):
            piece = flat[first : first + self.largest_count]
            self._complete(ALL_REDUCE, self.mpi.Iallreduce, MPI.IN_PLACE, piece)
            self._sent.add(2 * piece.nbytes * (self.size - 1) // self.size)

    def choose_reduction(self, shared: SharedReduction, sizes: list[int]) -> None:
        """Measure the sum through shared memory (and the ways between hosts) against MPI's, and use what is faster.

        `sizes`: numbers of float64 values, ascending; all ranks end with rank 0's choice. Each size has its own way
        between hosts; shared memory is used up to the largest size at which it is faster.
        """
        limit, table = 0, []
        for size in sizes:
            message = sample_addends(size)
            self.shared, self.shared_limit = None, 0
            by_mpi = self.median_seconds(message)
            self.shared, self.shared_limit = shared, size
            seconds = {}
            for way in shared.ways:
                shared.use([(size, way)])
                seconds[way] = self.median_seconds(message)
            best = self.broadcast(min(shared.ways, key=seconds.__getitem__))
            table.append((size, best))
            if seconds[best] < by_mpi or shared.virtual:
                limit = size
        self.shared_limit = self.broadcast(limit)
        shared.use(table)
        self.forget_costs()

    def forget_costs(self) -> None:
        """Begin anew to count seconds, collectives and what is sent."""
        self.seconds, self.calls, self._sent = 0.0, 0, Traffic()
        if self.shared is not None:
            self.shared.traffic.forget()

    @property
    def sent(self) -> Traffic:
        """What this rank sent during steps; of MPI's own collectives what the best algorithms send."""
        return self._sent if self.shared is None else self._sent + self.shared.traffic

    def median_seconds(self, message: np.ndarray) -> float:
        """Seconds of an all-reduce of such addends that all ranks begin together; the median of up to 15.

        Of 3 where ranks of rank 0's host share cores: the scheduler says how long each takes, and more would only hold
        the start up.
        """
        times = [self._seconds_of(message)]
        wished = 2 if self.yields else min(14, max(2, int(TIMING_SECONDS / times[0])))
        repetitions = self.broadcast(wished)  # hosts may differ in whether their ranks share cores
        times += [self._seconds_of(message) for _ in range(repetitions)]
        return float(np.median(times))

    def _seconds_of(self, message: np.ndarray) -> float:
        message = message.copy()
        self.barrier()
        start = time.perf_counter()
        self.all_reduce(message)
        return time.perf_counter() - start

    def gather_columns(self, part: np.ndarray, widths: list[int]) -> np.ndarray:
        """On rank 0 join float32 [rows, widths[rank]] of all ranks along the columns; elsewhere there are no rows."""
        if self.size == 1:
            return part
        rows, at_once = len(part), max(1, self.largest_count // max(1, sum(widths)))
        if rows > at_once:
            pieces = [part[first : first + at_once] for first in range(0, rows, at_once)]
            return np.concatenate([self.gather_columns(piece, widths) for piece in pieces])
        counts = [rows * width for width in widths]
        gathered = np.empty(sum(counts) if self.is_root else 0, np.float32)
        with self._timed():
            place = [gathered, counts] if self.is_root else None
            self._complete("the gathering of logits", self.mpi.Igatherv, np.ascontiguousarray(part), place)
        if not self.is_root:
            self._sent.add(part.nbytes, int(part.size > 0))
            return np.empty((0, sum(widths)), np.float32)
        borders = np.cumsum(counts)[:-1]
        return np.concatenate([p.reshape(rows, -1) for p in np.split(gathered, borders)], axis=1)

    def gather_parts(self, part: np.ndarray, widths: Sequence[int]) -> list[np.ndarray]:
        """Give float32 [rows, widths[rank]] of every rank to all of them, in order of rank."""
        if self.size == 1:
            return [part]
        counts = [len(part) * width for width in widths]
        gathered = np.empty(sum(counts), np.float32)
        with self._timed():
            self._complete("the gathering of queries", self.mpi.Iallgatherv, part, [gathered, counts])
        self._sent.add(part.nbytes * (self.size - 1), (self.size - 1) * int(part.size > 0))
        return [p.reshape(len(part), -1) for p in np.split(gathered, np.cumsum(counts)[:-1])]

    def exchange(self, sent: np.ndarray, to: list[int], received: np.ndarray, of: list[int]) -> None:
        """Give each rank so many numbers of float32 `sent`, one rank's behind the other's; `received` lies likewise."""
        with self._timed():
            place = "the exchange of what ranks attended to"
            self._complete(place, self.mpi.Ialltoallv, [sent[: sum(to)], to], [received[: sum(of)], of])
        others = [count for rank, count in enumerate(to) if rank != self.rank and count]
        self._sent.add(sent.itemsize * sum(others), len(others))

    def broadcast_plan(self, plan: np.ndarray) -> None:
        """Give rank 0's step plan to all ranks; they may wait for it for hours, so the wait goes to sleep."""
        if self.size == 1:
            return
        self.watch.enter(PLAN)
        request = self.mpi.Ibcast(plan)
        self._sent.add(plan.nbytes * (children := tree_children(self.rank, self.size)), children)
        self.complete(request)
        self.watch.leave()

    def complete(self, request: MPI.Request) -> None:
        """Wait for what is under way, within a wait that the watch knows of."""
        backoff = Backoff(self.yields)
        while not request.Test():
            backoff.pause()
            self.watch.poll()

    def _complete(self, place: str, start: Callable[..., MPI.Request], *buffers: Any) -> None:
        """Run a collective to its end; `place` names it for whoever waits in vain."""
        self.watch.enter(place, self.is_of_all)
        self.complete(start(*buffers))
        self.watch.leave()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.calls += 1

    # -- the collectives of start and end ----------------------------------------------------------------------------

    def broadcast(self, value: T, place: str = "a broadcast of rank 0") -> T:
        """Give rank 0's object to all ranks."""
        if self.size == 1:
            return value
        data = pickle.dumps(value) if self.is_root else b""
        length = np.array([len(data)], np.int64)
        self._complete(place, self.mpi.Ibcast, length)
        buffer = np.frombuffer(data, np.uint8).copy() if self.is_root else np.empty(length[0], np.uint8)
        self._complete(place, self.mpi.Ibcast, buffer)
        result: T = value if self.is_root else pickle.loads(buffer.tobytes())
        return result

    def broadcast_arrays(self, arrays: Sequence[np.ndarray]) -> None:
        """Give rank 0's values to all ranks in place, in few messages; contiguous arrays, of the same sizes on all."""
        if self.size == 1:
            return
        flat = [array.reshape(-1).view(np.uint8) for array in arrays]
        parts = [a[i : i + MESSAGE_BYTES] for a in flat for i in range(0, len(a), MESSAGE_BYTES)]
        while parts:
            count = max(1, int(np.searchsorted(np.cumsum([len(p) for p in parts]), MESSAGE_BYTES, "right")))
            self._broadcast_joined(parts[:count])
            parts = parts[count:]

    def _broadcast_joined(self, parts: list[np.ndarray]) -> None:
        message = np.concatenate(parts)
        self._complete("the broadcast of what all ranks hold", self.mpi.Ibcast, message)
        start = 0
        for part in parts:
            part[:] = message[start : start + len(part)]
            start += len(part)

    def gather(self, value: T, place: str = "a gathering of all ranks") -> list[T]:
        """Give every rank's object to all ranks, in order of rank."""
        if self.size == 1:
            return [value]
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        lengths = np.empty(self.size, np.int64)
        self._complete(place, self.mpi.Iallgather, np.array([len(data)], np.int64), lengths)
        gathered = np.empty(int(lengths.sum()), np.uint8)
        self._complete(place, self.mpi.Iallgatherv, data, [gathered, lengths.tolist()])
        return [pickle.loads(part.tobytes()) for part in np.split(gathered, np.cumsum(lengths)[:-1])]

    def barrier(self) -> None:
        self._complete("a barrier", self.mpi.Ibarrier)

    def attend(self) -> None:
        """Show the other ranks that this one is alive, in the midst of long work; from its main thread."""
        self.watch.attend()

    def doing(self, what: str) -> AbstractContextManager[Callable[[str], None]]:
        """Tell a person who watches rank 0 what takes long; gives the function that is told how far it is."""
        return self.watch.display(what)

    def busy(self, action: Callable[[], T], what: str = "") -> T:
        """Do what may take long and uses no MPI: meanwhile this rank answers the others, and tells `what` it does."""
        with self.doing(what) if what else nullcontext():
            return do_in_thread(self.watch, action)

    def counting(self, on_bytes: Callable[[int], None]) -> Callable[[int], None]:
        """As `on_bytes`, and whoever waits for this rank sees that it gets on; for any thread."""

        def count(done: int) -> None:
            self.watch.work += done
            self.watch.attend()
            on_bytes(done)

        return count

    def idle(self) -> AbstractContextManager[None]:
        """Rank 0 waits for a person or a pipe: the others wait for its next plan as long as it takes."""
        return self.watch.idle()

    def twin(self) -> "Communicator":
        """Another communicator of the same ranks, whose sums go their own ways."""
        with self.watch.blocking("the start"):
            return Communicator(self.mpi.Dup(), self.yields, self.watch, self.is_of_all)

    def of_this_rank(self) -> "Communicator":
        """A communicator of this rank alone, which is watched as this one."""
        return Communicator(MPI.COMM_SELF.Dup(), self.yields, self.watch, is_of_all=False)

    def free_sums(self) -> None:
        """Give back a twin, or the communicator of a rank; what watches belongs to the communicator they came from."""
        if self.shared is not None:
            self.shared.free()
            self.shared = None
        self.mpi.Free()

    def abandon_sums(self) -> None:
        """End the thread that brings sums from other hosts, which may never come."""
        if self.shared is not None:
            self.shared.abandon()

    def neighbours(self) -> "Communicator":
        """Return the communicator of the ranks on this rank's host."""
        with self.watch.blocking("the start"):
            mates = cast(MPI.Intracomm, self.mpi.Split_type(MPI.COMM_TYPE_SHARED))
        return Communicator(mates, self.yields, self.watch, is_of_all=False)

    def together(self, action: Callable[[], T], place: str = "an agreement of all ranks") -> T:
        """Do what any rank may fail at; if one does, all raise the same UserError (naming the rank, if not all do).

        Ranks that `attend` meanwhile leave off as soon as another one has failed.
        """
        result, mistake = attempt(action)
        if mistake is not None:
            self.watch.tell_failure()
        mistakes = self.gather(None if mistake is None else (os.uname().nodename, mistake), place)
        if any(m is not None for m in mistakes):
            raise UserError(self._blame(mistakes))
        return result  # type: ignore[return-value]

    def on_root(self, action: Callable[[], T]) -> T:
        """Do it on rank 0 only and give the result to all; a UserError is raised on all."""
        return self.broadcast(self.on_root_only(action))  # type: ignore[return-value]

    def on_root_only(self, action: Callable[[], T]) -> T | None:
        """Do it on rank 0 only, None on the others; a UserError is raised on all."""
        result, mistake = attempt(action) if self.is_root else (None, None)
        mistake = self.broadcast(mistake)
        if mistake is not None:
            raise UserError(mistake)
        return result

    def _blame(self, mistakes: list[tuple[str, str] | None]) -> str:
        """One sentence for what went wrong on some ranks, each given as host and sentence."""
        found = [(rank, *m) for rank, m in enumerate(mistakes) if m is not None]
        rank, host, sentence = found[0]
        if len(found) == self.size:
            return sentence
        return f"rank {rank} of {self.size} on {host}{f' and {len(found) - 1} more' if found[1:] else ''}: {sentence}"


def tree_children(rank: int, size: int) -> int:
    """To how many ranks one sends rank 0's message, if it goes along a binomial tree."""
    lowest = rank & -rank if rank else size
    return sum(1 for bit in range(size.bit_length()) if 1 << bit < lowest and rank + (1 << bit) < size)


def sample_addends(count: int) -> np.ndarray:
    """What layers of a model add up, by its size: float64 [count], multiples of 2^-30 about 0.1."""
    return np.random.default_rng(0).normal(0, 2**27, count).round() * 2.0**-30


def attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of an action, or the sentence that says why there is none: a user's mistake, or too little memory."""
    try:
        return action(), None
    except UserError as error:
        return None, str(error)
    except OthersFailedError:
        return None, None
    except (MemoryError, OSError, RuntimeError, ImportError) as error:
        if sentence := out_of_memory(error):
            return None, f"host {os.uname().nodename} is {sentence}"
        raise


class Rounds:
    """News of every rank, a few numbers each, while all are busy, so that nobody waits for anybody.

    One all-gather after the other is begun and completed on the way; the main thread alone may use it.

    All ranks see the same rounds: whatever they decide by a round's numbers, they decide alike. Rounds have a
    communicator of their own, which all ranks make together, so that one that never comes disturbs no other collective.
    """

    def __init__(self, comm: Communicator):
        with comm.watch.blocking("the start of loading"):
            self.mpi = comm.mpi.Dup()
        self.under_way: MPI.Request | None = None
        self.told = self.heard = np.empty(0, np.int64)

    def exchange(self, news: np.ndarray) -> np.ndarray | None:
        """Tell int64 [count] in the next round that begins; returns [ranks, count] when a round is complete."""
        if self.under_way is None:
            self.told = news.astype(np.int64)
            self.heard = np.empty((self.mpi.size, len(news)), np.int64)
            self.under_way = self.mpi.Iallgather(self.told, self.heard)
        if not self.under_way.Test():
            return None
        self.under_way = None
        return self.heard
