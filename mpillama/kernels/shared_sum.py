"""The sum over ranks of one host through memory that they share; kernels/src/shared_sum.h says how."""

from ctypes import byref

import numpy as np

from mpillama.kernels import arguments
from mpillama.kernels.library import Team

FLAG_STRIDE = 8
"""Flags lie a cache line apart, int64 [ranks, 8]: how often a rank's threads have arrived, and how many they are."""
PROGRESS_STRIDE = 8


BLOCK, BLOCK_HEADER = 32, 2
"""Numbers that are packed together, and the bytes that say how; kernels/src/packed_sums.h."""


def window_bytes(ranks: int, capacity: int, several_hosts: bool = False) -> int:
    """Bytes of flags and slots; with several hosts of totals, too."""
    return (8 * FLAG_STRIDE + 16 * capacity) * (ranks + several_hosts)


class SharedWindow:
    """Flags and two slots of `capacity` float64 for each rank, in `memory` (uint8) that all ranks of a host see.

    With `several_hosts` the first rank also has places for the totals of two exchanges, which the others read.
    """

    def __init__(
        self, team: Team, memory: np.ndarray, ranks: int, rank: int, capacity: int, several_hosts: bool = False
    ):
        border, end = 8 * FLAG_STRIDE * ranks, window_bytes(ranks, capacity)
        self.library = team.library
        self.threads = team.threads
        self.rank = rank
        self.capacity = capacity
        self.flags = memory[:border].view(np.int64).reshape(ranks, FLAG_STRIDE)
        self.slots = memory[border:end].view(np.float64).reshape(2, ranks, capacity)
        self.argument = arguments.Window(self.slots.ctypes.data, self.flags.ctypes.data, ranks, rank, capacity)
        beyond = memory[end : window_bytes(ranks, capacity, several_hosts)]
        self.published = beyond[: 8 * FLAG_STRIDE].view(np.int64)
        self.totals = beyond[8 * FLAG_STRIDE :].view(np.float64).reshape(-1, capacity)
        if several_hosts:
            self.argument.totals, self.argument.published = self.totals.ctypes.data, self.published.ctypes.data

    def clear(self) -> None:
        """Begin: once for this rank, before any rank adds up."""
        self.flags[self.rank] = 0
        self.flags[self.rank, 1] = self.threads
        if self.rank == 0:
            self.published[:] = 0

    def exchanges(self, tokens: int, width: int) -> list[int]:
        """The numbers of each exchange that it takes to add up float64 [tokens, width] in the kernels.

        A token must fit a slot.
        """
        at_once = self.capacity // width
        return [min(at_once, tokens - first) * width for first in range(0, tokens, at_once)]

    def sum(self, partial: np.ndarray, sequence: int, posted: bool, spins: int, yields: int) -> bool:
        """Replace partial float64 [n] by its sum over ranks; returns whether it was there while it waited.

        Polls `spins` times, then gives the core away up to `yields` times. If it returns False, call again with
        `posted`: the addends are in place already.
        """
        done = self.library.calls.sum_shared(
            byref(self.argument), partial.ctypes.data, len(partial), sequence, int(posted), spins, yields
        )
        return bool(done)

    def sum_host(self, count: int, sequence: int, spins: int, yields: int) -> bool:
        """Begin the totals with what this host's ranks have; returns whether they all arrived while it waited."""
        return bool(self.library.calls.sum_host(byref(self.argument), count, sequence, spins, yields))

    def totals_of(self, sequence: int, count: int) -> np.ndarray:
        """Where the totals of an exchange lie, float64 [count]."""
        totals: np.ndarray = self.totals[sequence % 2, :count]
        return totals

    def publish(self, sequence: int) -> None:
        """Give the totals to this host's ranks."""
        self.library.calls.publish(byref(self.argument), sequence)

    # -- messages to other hosts ---------------------------------------------------------------------------------------

    @staticmethod
    def packed_limit(count: int) -> int:
        """The most bytes that so many numbers take."""
        return BLOCK_HEADER * -(-count // BLOCK) + 8 * count

    def pack(self, values: np.ndarray, out: np.ndarray) -> int:
        """Write float64 [count] to uint8 [packed_limit(count)] in few bits; returns the bytes."""
        return int(self.library.calls.pack(values.ctypes.data, len(values), out.ctypes.data))

    def unpack(self, message: np.ndarray, totals: np.ndarray, begin: bool) -> None:
        """Add what was packed to float64 [count], or begin them with it; ValueError if it is no such message."""
        address, size = message.ctypes.data, len(message)
        if not self.library.calls.unpack(address, size, len(totals), totals.ctypes.data, begin):
            raise ValueError(f"a message of {size} bytes does not hold the {len(totals)} numbers of a sum")
