"""The sum over hosts: one rank of each, its leader, exchanges what its host's ranks have added up.

Messages are packed (kernels/src/packed_sums.h), and sums are exact, so all ways of exchanging them give the same bits.
"""

import os
import time
from collections.abc import Callable, Generator, Iterable
from itertools import accumulate, pairwise
from typing import Protocol, cast

import numpy as np
from mpi4py import MPI

from mpillama.comm.ways import MOST_DIRECT, MOST_PIECES, RANKS_PER_HOST, Traffic, grid_of, virtual_host

PING_BYTES = 64
UNIT = 32
"""Numbers that are packed together: pieces of a vector end between them."""
Array = np.ndarray
Look = Callable[[], None]
Steps = Generator[None, None, None]
"""Goes on as soon as messages have come, a little at a time; to be closed if nobody waits for its end."""


class Packer(Protocol):
    """What packs multiples of 2^-30: kernels.shared_sum.SharedWindow."""

    def packed_limit(self, count: int) -> int:
        """The most bytes that so many numbers take."""

    def pack(self, values: Array, out: Array) -> int:
        """Write float64 [count] to uint8; returns the bytes."""

    def unpack(self, message: Array, totals: Array, begin: bool) -> None:
        """Add what was packed to float64 [count], or begin them with it."""


def host_mates(mpi: MPI.Intracomm) -> MPI.Intracomm:
    """The communicator of the ranks on this rank's host."""
    if text := os.environ.get(RANKS_PER_HOST):
        return cast(MPI.Intracomm, mpi.Split(virtual_host(text, mpi.rank), mpi.rank))
    return cast(MPI.Intracomm, mpi.Split_type(MPI.COMM_TYPE_SHARED))


def is_first_of_host(mpi: MPI.Intracomm) -> bool:
    """Whether this rank is the lowest one of its host; all ranks must call this."""
    mates = host_mates(mpi)
    first = mates.rank == 0
    mates.Free()
    return bool(first)


class HostExchange:
    """Adds up vectors of the leaders of all hosts; `table` says which way up to which number of numbers."""

    def __init__(
        self, leaders: MPI.Intracomm, packer: Packer, capacity: int, traffic: Traffic,
        pause: Callable[[], Callable[[], None]],
    ):  # fmt: skip
        self.mpi = leaders
        self.rank, self.size = leaders.rank, leaders.size
        self.packer = packer
        self.capacity = capacity
        self.pause = pause
        self.traffic = traffic
        self.whole = 1 << (self.size.bit_length() - 1)
        self.table: list[tuple[int, str]] = [(capacity, "direct" if self.size <= MOST_DIRECT else "doubling")]
        self._travellers: dict[int, Traveller] = {}

    def free(self) -> None:
        """Give back what this holds of MPI, and the memory for messages, which refers to this in turn."""
        self._travellers.clear()
        self.mpi.Free()

    def way_for(self, count: int) -> str:
        return next((way for limit, way in self.table if count <= limit), self.table[-1][1])

    def sum(self, totals: Array, look: Look, place: int = 0) -> None:
        """Replace float64 [count] by its sum over hosts; `look` is called now and then while it waits."""
        pause = self.pause()
        for _ in self.begin(totals, place):
            pause()
            look()

    def begin(self, totals: Array, place: int) -> Steps:
        """The same a little at a time, as often as messages are awaited. Sums in several places may travel together.

        All hosts must begin those of a place in the same order, each when the one before has ended.
        """
        if place not in self._travellers:
            self._travellers[place] = Traveller(self, place)
        return self._travellers[place].travel(totals, self.way_for(len(totals)))


class Traveller:
    """One sum on its way, with memory for its messages; `place` is their tag."""

    def __init__(self, hosts: HostExchange, place: int):
        self.hosts = hosts
        self.rank, self.size, self.whole = hosts.rank, hosts.size, hosts.whole
        self.packer = hosts.packer
        self.place = place
        pieces = max(min(self.size, MOST_PIECES), *grid_of(self.size))
        each = self.packer.packed_limit(hosts.capacity) + pieces * self.packer.packed_limit(UNIT)
        self._outgoing = np.empty(each, np.uint8)
        self._incoming = np.empty((self.size if self.size <= MOST_DIRECT else 2, each), np.uint8)

    def travel(self, totals: Array, way: str) -> Steps:
        """Replace float64 [count] by its sum over hosts."""
        ways = {
            "direct": self._direct, "pieces": self._pieces, "grid": self._grid, "doubling": self._doubling,
            "halving": self._halving,
        }  # fmt: skip
        return ways[way](totals)

    def _direct(self, totals: Array) -> Steps:
        """Everybody sends everybody what it has: one round, the most bytes."""
        message = self._pack(totals, 0)
        others = [host for host in range(self.size) if host != self.rank]
        places = {host: self._incoming[host] for host in others}
        sizes = yield from self._exchange(dict.fromkeys(others, message), places)
        for host in range(self.size):  # in this order everywhere, for what overflowed and is not exact
            arrived = message if host == self.rank else self._incoming[host, : sizes[host]]
            self.packer.unpack(arrived, totals, begin=host == 0)

    def _pieces(self, totals: Array) -> Steps:
        """Each host adds up a piece of the vector and tells all others: two rounds."""
        yield from self._scatter(totals, range(self.size))
        yield from self._gather(totals, range(self.size))

    def _grid(self, totals: Array) -> Steps:
        """Hosts in rows and columns: pieces within a row, of the own piece within a column, and back; four rounds."""
        rows, columns = grid_of(self.size)
        with_rest = yield from self._join_rest(totals, rows * columns)
        if with_rest is None:
            return
        row = range(self.rank // columns * columns, (self.rank // columns + 1) * columns)
        column = range(self.rank % columns, rows * columns, columns)
        mine = yield from self._scatter(totals, row)
        yield from self._scatter(mine, column)
        yield from self._gather(mine, column)
        yield from self._gather(totals, row)
        yield from self._answer_rest(totals, rows * columns, with_rest)

    def _scatter(self, totals: Array, hosts: range) -> Generator[None, None, Array]:
        """Give each of these hosts its piece of what we have; returns ours, added up."""
        parts, starts = self._parts(totals, len(hosts))
        mine = parts[hosts.index(self.rank)]
        incoming, limit = self._incoming.reshape(-1), self.packer.packed_limit(len(mine))
        outgoing = {
            host: self._pack(part, start) for host, part, start in zip(hosts, parts, starts, strict=False) if len(part)
        }
        arrived = {self.rank: outgoing.pop(self.rank)} if len(mine) else {}
        places = {
            host: incoming[limit * i : limit * (i + 1)]
            for i, host in enumerate(hosts)
            if len(mine) and host != self.rank
        }
        sizes = yield from self._exchange(outgoing, places)
        arrived |= {host: place[: sizes[host]] for host, place in places.items()}
        for host in sorted(arrived):  # in this order everywhere, for what overflowed and is not exact
            self.packer.unpack(arrived[host], mine, begin=host == hosts[0])
        return mine

    def _gather(self, totals: Array, hosts: range) -> Steps:
        """Tell these hosts our piece, and take theirs."""
        parts, starts = self._parts(totals, len(hosts))
        of_host = dict(zip(hosts, parts, strict=True))
        incoming = self._incoming.reshape(-1)
        places = {
            host: incoming[start : start + self.packer.packed_limit(len(part))]
            for host, part, start in zip(hosts, parts, starts, strict=False)
            if len(part) and host != self.rank
        }
        mine = of_host[self.rank]
        others = [host for host in hosts if host != self.rank]
        outgoing = dict.fromkeys(others, self._pack(mine, 0)) if len(mine) else {}
        sizes = yield from self._exchange(outgoing, places)
        for host, place in places.items():
            self.packer.unpack(place[: sizes[host]], of_host[host], begin=True)

    def _parts(self, totals: Array, count: int) -> tuple[list[Array], list[int]]:
        """A vector in pieces, and where the message of each begins."""
        parts = [totals[first:last] for first, last in pairwise(self._borders(len(totals), count))]
        return parts, list(accumulate((self.packer.packed_limit(len(part)) for part in parts), initial=0))

    def _doubling(self, totals: Array) -> Steps:
        """Neighbours, then neighbours' neighbours and so on exchange their sums: few messages for many hosts."""
        with_rest = yield from self._join_rest(totals, self.whole)
        if with_rest is None:
            return
        bit = 1
        while bit < self.whole:
            yield from self._swap(self.rank ^ bit, totals, totals, False)
            bit *= 2
        yield from self._answer_rest(totals, self.whole, with_rest)

    def _halving(self, totals: Array) -> Steps:
        """The same with half of the vector, a quarter and so on, and back: few messages, few bytes (Rabenseifner)."""
        with_rest = yield from self._join_rest(totals, self.whole)
        if with_rest is None:
            return
        borders = self._borders(len(totals), self.whole)
        low, high, bit, kept = 0, self.whole, self.whole // 2, []
        while bit:
            middle = low + bit
            kept.append((low, high))
            upper, lower = totals[borders[middle] : borders[high]], totals[borders[low] : borders[middle]]
            mine, other = (upper, lower) if self.rank & bit else (lower, upper)
            yield from self._swap(self.rank ^ bit, other, mine, False)
            low, high = (middle, high) if self.rank & bit else (low, middle)
            bit //= 2
        for bit in (1 << n for n in range(len(kept))):
            before = kept.pop()
            mine = totals[borders[low] : borders[high]]
            ends = (before[0], low) if self.rank & bit else (high, before[1])
            yield from self._swap(self.rank ^ bit, mine, totals[borders[ends[0]] : borders[ends[1]]], True)
            low, high = before
        yield from self._answer_rest(totals, self.whole, with_rest)

    def _join_rest(self, totals: Array, whole: int) -> Generator[None, None, bool | None]:
        """Hosts beyond the first `whole` give what they have to one of those, and get the sum: None."""
        partner = self.rank - whole
        if partner >= 0:
            yield from self._send_or_receive({partner: totals}, {}, False)
            yield from self._send_or_receive({}, {partner: totals}, True)
            return None
        has_rest = self.rank + whole < self.size
        if has_rest:
            yield from self._send_or_receive({}, {self.rank + whole: totals}, False)
        return has_rest

    def _answer_rest(self, totals: Array, whole: int, has_rest: bool) -> Steps:
        if has_rest:
            yield from self._send_or_receive({self.rank + whole: totals}, {}, False)

    def _swap(self, peer: int, give: Array, take: Array, begin: bool) -> Steps:
        """Send a peer what it is to have, and add what it sends to ours."""
        return self._send_or_receive({peer: give} if len(give) else {}, {peer: take} if len(take) else {}, begin)

    def _send_or_receive(self, give: dict[int, Array], take: dict[int, Array], begin: bool) -> Steps:
        outgoing = {host: self._pack(values, 0) for host, values in give.items()}
        sizes = yield from self._exchange(outgoing, dict.fromkeys(take, self._incoming[0]))
        for host, values in take.items():
            self.packer.unpack(self._incoming[0, : sizes[host]], values, begin)

    def _borders(self, count: int, parts: int) -> list[int]:
        units = -(-count // UNIT)
        return [min(count, UNIT * (units * part // parts)) for part in range(parts + 1)]

    def _pack(self, values: Array, start: int) -> Array:
        size = self.packer.pack(values, self._outgoing[start:])
        return self._outgoing[start : start + size]

    def _exchange(
        self, outgoing: dict[int, Array], incoming: dict[int, Array]
    ) -> Generator[None, None, dict[int, int]]:
        """Send and receive, all at the same time; returns the bytes that came from each host."""
        mpi, traffic = self.hosts.mpi, self.hosts.traffic
        receives = [mpi.Irecv([place, MPI.BYTE], host, self.place) for host, place in incoming.items()]
        sends = [mpi.Isend([message, MPI.BYTE], host, self.place) for host, message in outgoing.items()]
        for message in outgoing.values():
            traffic.add(len(message))
        requests, statuses = [*receives, *sends], [MPI.Status() for _ in (*receives, *sends)]
        try:
            while not MPI.Request.Testall(requests, statuses):
                yield
        except BaseException:  # of the caller, who gives up, too
            give_up(receives)
            raise
        return {host: status.Get_count(MPI.BYTE) for host, status in zip(incoming, statuses, strict=False)}


def one_way_seconds(
    mpi: MPI.Intracomm, pause: Callable[[], Callable[[], None]], look: Look = lambda: None, repetitions: int = 200
) -> float:
    """Half of the median time of a small message from rank 0 to rank 1 and back; 0 on other ranks than 0.

    `look` is called now and then while it waits.
    """
    message, seconds = np.zeros(PING_BYTES, np.uint8), [0.0]
    if mpi.rank > 1:
        return 0.0
    for _ in range(repetitions):
        start = time.perf_counter()
        for direction in (0, 1):
            is_sender = mpi.rank == direction
            request = (mpi.Isend if is_sender else mpi.Irecv)([message, MPI.BYTE], 1 - mpi.rank)
            look_again = pause()
            try:
                while not request.Test():
                    look_again()
                    look()
            except BaseException:
                give_up([] if is_sender else [request])
                raise
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:])) / 2 if mpi.rank == 0 else 0.0


def give_up(receives: Iterable[MPI.Request]) -> None:
    """Wait no longer for what may still come: its place in memory may soon be another's."""
    for request in receives:
        if request != MPI.REQUEST_NULL:
            request.Cancel()
            request.Wait()


def leaders_of(mpi: MPI.Intracomm, mates: MPI.Intracomm) -> MPI.Intracomm | None:
    """The communicator of each host's first rank, in order of rank; None on the other ranks."""
    found = mpi.Split(0 if mates.rank == 0 else MPI.UNDEFINED, mpi.rank)
    return None if found == MPI.COMM_NULL else cast(MPI.Intracomm, found)


def count_hosts(mpi: MPI.Intracomm, mates: MPI.Intracomm) -> int:
    """How many hosts the ranks are on."""
    return int(mpi.allreduce(int(mates.rank == 0)))
